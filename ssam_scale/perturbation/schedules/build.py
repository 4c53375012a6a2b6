"""The schedule that a configuration describes."""

from __future__ import annotations

from ssam_scale.config.schema import Perturbation
from ssam_scale.errors import UserError

from .interface import RADIUS_SCHEDULES, RadiusSchedule
from .interval import Interval
from .window import Window


def build_schedule(section: Perturbation, steps: int) -> RadiusSchedule:
    """The radius over the run, in every step or in those of an interval and a window.

    Args:
        section: `perturbation` of the configuration.
        steps: optimizer steps of the whole run.

    Raises:
        UserError: its window holds no step.
    """
    schedule = RADIUS_SCHEDULES[section.rho_schedule].value(section, steps)
    first, last = (round(share * steps) for share in section.window)
    if first == last:
        raise UserError(f"perturbation.window {list(section.window)} holds none of the run's {steps} steps")
    if section.interval > 1:
        schedule = Interval(section.interval, schedule, section.reuse)
    if (first, last) != (0, steps):
        schedule = Window(first, last, schedule)
    return schedule

"""What a schedule is: how the radius ρ changes over training, as a factor on each parameter group's own `rho`.

A factor of 0 makes a step the base optimizer's. Each file in `radius/` is a value of `perturbation.rho_schedule`, under
its own name; `Interval` and `Window` are schedules around another one, with keys of their own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

from ssam_scale.checks import described
from ssam_scale.config.schema import Perturbation
from ssam_scale.registry import Registry


class RadiusSchedule(Protocol):
    """A function of the step and the parameter group, so that nothing of it has to be saved."""

    def __call__(self, step: int, group: Mapping[str, Any]) -> float:
        """The factor on `group["rho"]` at step number `step`, from 0."""


def check_schedule(schedule: Any) -> None:
    """Refuse what is no schedule.

    Raises:
        TypeError: it is none.
    """
    needed = "a schedule is needed, such as CosineRadius(steps) or Interval(2), or a function of (step, group)"
    if isinstance(schedule, type) or not callable(schedule):
        raise TypeError(f"schedule is {described(schedule)}; {needed}")
    try:
        inspect.signature(schedule).bind(0, {})
    except TypeError:
        raise TypeError(
            f"schedule is {described(schedule)}, which does not take a step and a group; {needed}"
        ) from None
    except ValueError:  # a builtin, of which nothing is known
        pass


Build = Callable[[Perturbation, int], RadiusSchedule]

RADIUS_SCHEDULES: Registry[Build] = Registry("ssam_scale.perturbation.schedules.radius")
"""By `perturbation.rho_schedule`: functions that build a schedule from that section and the steps of the run."""

WRAPPERS: Registry[Callable[..., RadiusSchedule]] = Registry("ssam_scale.perturbation.schedules")
"""Schedules around another one, by the key of the section `perturbation` that asks for them."""


def register_schedule(summary: str, paper: str = "") -> Callable[[Build], Build]:
    """A decorator of the function that builds the schedule of its file: `build(section, steps) -> RadiusSchedule`.

    The schedule's name is that of the file, by which the configuration knows it without importing it.

    Args:
        summary: how the radius changes, in one line.
        paper: where it comes from.
    """

    def decorate(build: Build) -> Build:
        name = build.__module__.rpartition(".")[2]
        return RADIUS_SCHEDULES.register(name, summary, paper)(build)

    return decorate


@runtime_checkable
class ReusesAscents(Protocol):
    """A schedule in which steps without an ascent may reuse what the last one brought (LookSAM)."""

    def reuse_at(self, step: int) -> float:
        """How much of it is added to the gradient at step number `step`: α of LookSAM; 0: nothing."""

    def ever_reuses(self) -> bool:
        """Whether any step does."""


def reuse_at(schedule: RadiusSchedule, step: int) -> float:
    """α of LookSAM at step number `step`; 0 where there is an ascent, or what one brought is not reused."""
    return schedule.reuse_at(step) if isinstance(schedule, ReusesAscents) else 0.0


def ever_reuses(schedule: RadiusSchedule) -> bool:
    """Whether any step reuses what the last ascent brought."""
    return isinstance(schedule, ReusesAscents) and schedule.ever_reuses()

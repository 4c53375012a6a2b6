"""The radius moves along half a cosine."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ssam_scale.anneal import cosine_annealed
from ssam_scale.checks import check_number
from ssam_scale.config.schema import Perturbation
from ssam_scale.perturbation.schedules.interface import RadiusSchedule, register_schedule


@dataclass(frozen=True)
class CosineRadius:
    """From ρ to `final` · ρ along half a cosine.

    Attributes:
        steps: optimizer steps of the way; afterwards it stays at the end.
        final: factor at the end, at least 0; above 1 the radius grows.
    """

    steps: int
    final: float = 0.0

    def __post_init__(self) -> None:
        check_number("steps", self.steps, "at least 1", lambda steps: steps >= 1, whole=True)
        check_number("final", self.final, "a factor of at least 0", lambda factor: 0.0 <= factor < math.inf)

    def __call__(self, step: int, group: Mapping[str, Any]) -> float:
        """final + (1 − final) · (1 + cos(π · step / steps)) / 2."""
        return cosine_annealed(1.0, self.final, step / self.steps)


@register_schedule("from rho to rho_final · rho along half a cosine over the run")
def build(section: Perturbation, steps: int) -> RadiusSchedule:
    """The schedule of the section `perturbation`."""
    return CosineRadius(steps, section.rho_final)

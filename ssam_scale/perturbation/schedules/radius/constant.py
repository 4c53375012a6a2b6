"""The radius stays the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ssam_scale.config.schema import Perturbation
from ssam_scale.perturbation.schedules.interface import RadiusSchedule, register_schedule


@dataclass(frozen=True)
class ConstantRadius:
    """ρ as it is."""

    def __call__(self, step: int, group: Mapping[str, Any]) -> float:
        """1."""
        return 1.0


@register_schedule("rho as it is, in every step (SAM)", "arXiv 2010.01412")
def build(section: Perturbation, steps: int) -> RadiusSchedule:
    """The schedule of the section `perturbation`."""
    return ConstantRadius()

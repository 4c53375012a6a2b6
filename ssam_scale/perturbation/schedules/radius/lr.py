"""The radius follows the learning rate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ssam_scale.config.schema import Perturbation
from ssam_scale.perturbation.schedules.interface import RadiusSchedule, register_schedule


@dataclass(frozen=True)
class LRRadius:
    """ρ follows each group's learning rate: as in GSAM (arXiv 2203.08065, section 5) the two fall together.

    Attributes:
        final: factor where the learning rate is 0, at least 0.
    """

    final: float = 0.0

    def __post_init__(self) -> None:
        if self.final < 0.0:
            raise ValueError(f"final is {self.final}; at least 0 is needed")

    def __call__(self, step: int, group: Mapping[str, Any]) -> float:
        """final + (1 − final) · lr / initial_lr, without the group's `lr_scale` (timm's), which says nothing of time.

        Raises:
            ValueError: nothing has said what the learning rate was at first.
        """
        if "initial_lr" not in group:
            raise ValueError(
                "LRRadius needs the group's `initial_lr`, which a learning-rate scheduler notes: build the scheduler "
                "before the first step"
            )
        rate = float(group["lr"]) / float(group.get("lr_scale", 1.0))
        return self.final + (1.0 - self.final) * rate / float(group["initial_lr"])


@register_schedule("in step with the learning rate, down to rho_final · rho where it is 0 (GSAM)", "arXiv 2203.08065")
def build(section: Perturbation, steps: int) -> RadiusSchedule:
    """The schedule of the section `perturbation`."""
    return LRRadius(section.rho_final)

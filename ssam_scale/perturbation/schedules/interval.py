"""An ascent in every k-th step only, and LookSAM's reuse of it in the steps between."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ssam_scale.checks import check_number

from .interface import WRAPPERS, RadiusSchedule, check_schedule, ever_reuses, reuse_at
from .radius.constant import ConstantRadius


@WRAPPERS.register(
    "interval", "an ascent in every k-th step only; with `reuse`, LookSAM between them", "arXiv 2203.02714"
)
@dataclass(frozen=True)
class Interval:
    """An ascent in one step of every `every`, the first; the others are steps of the base optimizer, and cost one.

    Attributes:
        every: steps from one ascent to the next.
        schedule: of the radius in the steps that have one.
        reuse: how much of what the last ascent brought is added to the gradient of the others, relative to it: α of
            LookSAM (see `looksam.LookSAM`). With 0 they are the base optimizer's.
    """

    every: int
    schedule: RadiusSchedule = field(default_factory=ConstantRadius)
    reuse: float = 0.0

    def __post_init__(self) -> None:
        check_number("every", self.every, "at least 1", lambda steps: steps >= 1, whole=True)
        check_number("reuse", self.reuse, "at least 0", lambda share: 0.0 <= share < math.inf)
        check_schedule(self.schedule)

    def __call__(self, step: int, group: Mapping[str, Any]) -> float:
        """0 between ascents."""
        return self.schedule(step, group) if step % self.every == 0 else 0.0

    def reuse_at(self, step: int) -> float:
        """See `ReusesAscents`."""
        return self.reuse if step % self.every else reuse_at(self.schedule, step)

    def ever_reuses(self) -> bool:
        """See `ReusesAscents`."""
        return (self.every > 1 and self.reuse > 0.0) or ever_reuses(self.schedule)

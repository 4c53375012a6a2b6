"""Ascents in a part of the run only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ssam_scale.checks import check_number

from .interface import WRAPPERS, RadiusSchedule, check_schedule, ever_reuses, reuse_at
from .radius.constant import ConstantRadius


@WRAPPERS.register("window", "ascents in a part of the run only: after a warm-up, or in its last phase")
@dataclass(frozen=True)
class Window:
    """Ascents in a part of the run only: after a warm-up, or in its last phase.

    Attributes:
        start: first step with an ascent.
        stop: first step without one again; None: the run's end.
        schedule: of the radius in the steps that have one.
    """

    start: int = 0
    stop: int | None = None
    schedule: RadiusSchedule = field(default_factory=ConstantRadius)

    def __post_init__(self) -> None:
        for name, step in {"start": self.start, "stop": self.stop}.items():
            if step is not None:
                check_number(name, step, "the number of a step, at least 0,", lambda n: n >= 0, whole=True)
        check_schedule(self.schedule)
        if self.stop is not None and self.stop <= self.start:
            raise ValueError(f"start is {self.start} and stop {self.stop}; 0 <= start < stop is needed")

    def __call__(self, step: int, group: Mapping[str, Any]) -> float:
        """0 outside."""
        return self.schedule(step, group) if self._holds(step) else 0.0

    def reuse_at(self, step: int) -> float:
        """See `ReusesAscents`."""
        return reuse_at(self.schedule, step) if self._holds(step) else 0.0

    def ever_reuses(self) -> bool:
        """See `ReusesAscents`."""
        return ever_reuses(self.schedule)

    def _holds(self, step: int) -> bool:
        """Whether step number `step` lies inside."""
        return self.start <= step and (self.stop is None or step < self.stop)

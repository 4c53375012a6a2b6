"""How the radius ρ changes over training: a factor on each parameter group's own `rho`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ssam_scale.anneal import along_half_cosine


class RadiusSchedule(Protocol):
    """A function of the step and the parameter group, so that nothing of it has to be saved."""

    def __call__(self, step: int, group: Mapping[str, Any]) -> float:
        """The factor on `group["rho"]` at step number `step`, from 0."""


@dataclass(frozen=True)
class ConstantRadius:
    """ρ as it is."""

    def __call__(self, step: int, group: Mapping[str, Any]) -> float:
        """1."""
        return 1.0


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
        if self.steps < 1 or self.final < 0.0:
            raise ValueError(f"steps is {self.steps} and final {self.final}; at least 1 and at least 0 are needed")

    def __call__(self, step: int, group: Mapping[str, Any]) -> float:
        """final + (1 − final) · (1 + cos(π · step / steps)) / 2."""
        return along_half_cosine(1.0, self.final, step / self.steps)


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
        """final + (1 − final) · lr / initial_lr.

        Raises:
            ValueError: nothing has said what the learning rate was at first.
        """
        if "initial_lr" not in group:
            raise ValueError(
                "LRRadius needs the group's `initial_lr`, which a learning-rate scheduler notes: build the scheduler "
                "before the first step"
            )
        return self.final + (1.0 - self.final) * float(group["lr"]) / float(group["initial_lr"])


@dataclass(frozen=True)
class Interval:
    """An ascent in one step of every `every`, the first; the others are steps of the base optimizer, and cost one.

    Attributes:
        every: steps from one ascent to the next.
        schedule: of the radius in the steps that have one.
        reuse: how much of what the last ascent brought is added to the gradient of the others, relative to it: α of
            LookSAM (see `reuse.Reuse`). With 0 they are the base optimizer's.
    """

    every: int
    schedule: RadiusSchedule = ConstantRadius()
    reuse: float = 0.0

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every is {self.every}; at least 1 is needed")
        if not 0.0 <= self.reuse < math.inf:
            raise ValueError(f"reuse is {self.reuse}; at least 0 is needed")

    def __call__(self, step: int, group: Mapping[str, Any]) -> float:
        """0 between ascents."""
        return self.schedule(step, group) if step % self.every == 0 else 0.0


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
    schedule: RadiusSchedule = ConstantRadius()

    def __post_init__(self) -> None:
        if self.start < 0 or (self.stop is not None and self.stop <= self.start):
            raise ValueError(f"start is {self.start} and stop {self.stop}; 0 <= start < stop is needed")

    def __call__(self, step: int, group: Mapping[str, Any]) -> float:
        """0 outside."""
        return self.schedule(step, group) if self.holds(step) else 0.0

    def holds(self, step: int) -> bool:
        """Whether step number `step` lies inside."""
        return self.start <= step and (self.stop is None or step < self.stop)


def reuse_at(schedule: RadiusSchedule, step: int) -> float:
    """α of LookSAM at step number `step`; 0 where there is an ascent, or what one brought is not reused."""
    if isinstance(schedule, Window):
        return reuse_at(schedule.schedule, step) if schedule.holds(step) else 0.0
    if isinstance(schedule, Interval):
        return schedule.reuse if step % schedule.every else reuse_at(schedule.schedule, step)
    return 0.0


def reuses(schedule: RadiusSchedule) -> bool:
    """Whether any step does."""
    if isinstance(schedule, Interval) and schedule.every > 1 and schedule.reuse > 0.0:
        return True
    return isinstance(schedule, (Interval, Window)) and reuses(schedule.schedule)

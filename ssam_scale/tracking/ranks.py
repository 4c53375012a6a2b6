"""What the processes measured, beside each other: the quickest and the slowest of each phase, and who is waited for."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median_low

from ssam_scale.perturbation import Phase

from .timer import PHASES, PhaseSummary

# What a process does by itself, before it meets the others. A backend whose forward gathers weights (FSDP2, ZeRO 3)
# makes the others wait within it, so that a slow forward shows in all of them alike.
_ALONE: tuple[Phase, ...] = ("data", "ascent forward", "descent forward")
_ALONE_IF_GATHERED: tuple[Phase, ...] = ("data",)

NOTABLE = 0.05
"""Of a step: below it, waiting for a process is no news."""

SLOW, SLOW_STEPS = 1.5, 100
"""A straggler takes so many times what the others do, in so many steps on end."""


@dataclass(frozen=True)
class Measured:
    """By one process in a window of steps; not a number: not known.

    Attributes:
        loss: mean.
        step: mean time, seconds.
        phases: mean seconds of each of `PHASES`, in their order.
        peak_bytes: of memory.
        joules: that its GPU has taken since the window before.
    """

    loss: float
    step: float
    phases: tuple[float, ...]
    peak_bytes: float = math.nan
    joules: float = math.nan

    @classmethod
    def of(cls, summary: PhaseSummary, loss: float, peak_bytes: float, joules: float) -> Measured:
        """With the times of a window."""
        step = summary.seconds / summary.steps if summary.steps else math.nan
        return cls(loss, step, tuple(summary.phases.get(name, math.nan) for name in PHASES), peak_bytes, joules)

    def packed(self) -> list[float]:
        """As numbers, for an all-gather."""
        return [self.loss, self.step, self.peak_bytes, self.joules, *self.phases]

    def seconds_of(self, phases: Sequence[Phase]) -> float:
        """Seconds of some phases of a step, those that did not occur left out."""
        return sum(s for s in (self.phases[PHASES.index(phase)] for phase in phases) if not math.isnan(s))

    @classmethod
    def unpacked(cls, numbers: Sequence[float]) -> Measured:
        """What `packed` returned."""
        loss, step, peak_bytes, joules, *phases = numbers
        return cls(loss, step, tuple(phases), peak_bytes, joules)


class Ranks:
    """Compares the processes of a run, window by window.

    Args:
        hosts: the machine of each process, by rank.
        gathers: whether a forward gathers weights, so that it has waits for others in it.
    """

    def __init__(self, hosts: Sequence[str], *, gathers: bool = False) -> None:
        self._hosts = hosts
        self._alone = _ALONE_IF_GATHERED if gathers else _ALONE
        self._slow: tuple[int | None, int] = None, 0  # who, and in how many steps on end
        self._waited: list[tuple[int, float]] = []
        self._joules = 0.0
        self._told: set[int] = set()

    def metrics(self, measured: Sequence[Measured], *, images: int, steps: int = 1) -> dict[str, float]:
        """Take a window in, and return it under the names that it has in MLflow.

        `ranks/<phase>/min`, `/mean`, `/max`: seconds a step. `ranks/slowest`: the process that does its own work (data
        and forward passes) the slowest, and `ranks/waited_percent`: how long the others wait for it in each step.
        `memory/peak_gib`: of the process that needs the most. `energy/joules_per_image` and `energy/kwh_so_far`: of
        all GPUs, where each tells it.

        Args:
            measured: by rank.
            images: of all processes in the window.
            steps: in the window.
        """
        found: dict[str, float] = {}
        if len(measured) > 1:
            for place, name in enumerate(PHASES):
                seconds = [m.phases[place] for m in measured if not math.isnan(m.phases[place])]
                if seconds:
                    key = f"ranks/{name.replace(' ', '_')}"
                    found |= {f"{key}/min": min(seconds), f"{key}/mean": fmean(seconds), f"{key}/max": max(seconds)}
            own = [m.seconds_of(self._alone) for m in measured]
            slow, before = straggler_of(own, fmean(m.step for m in measured)), self._slow
            self._slow = slow, steps + (before[1] if slow == before[0] else 0)
            slowest, waited = waiting(measured)
            if not math.isnan(waited):
                self._waited.append((slowest, waited))
                found |= {"ranks/slowest": slowest, "ranks/waited_percent": 100.0 * waited}
        peaks = [m.peak_bytes for m in measured if not math.isnan(m.peak_bytes)]
        if peaks:
            found["memory/peak_gib"] = max(peaks) / 2**30
        joules = sum(m.joules for m in measured)
        if not math.isnan(joules):
            self._joules += joules
            found |= {"energy/joules_per_image": joules / images, "energy/kwh_so_far": self._joules / 3.6e6}
        return found

    def news(self) -> str | None:
        """A warning of a straggler, once for each, when it has been one for `SLOW_STEPS` on end."""
        rank, steps = self._slow
        if rank is None or steps < SLOW_STEPS or rank in self._told:
            return None
        self._told.add(rank)
        return (
            f"rank {rank} (node {self._hosts[rank]}) is slow: in {steps} steps its own work (data loading, forward "
            f"passes) took more than {SLOW} times the others'"
        )

    def straggler(self) -> str | None:
        """The process that the others waited for in most windows of the run, in words; None if there is no such one."""
        if not self._waited:
            return None
        ((rank, windows),) = Counter(rank for rank, waited in self._waited if waited >= NOTABLE).most_common(1) or [
            (0, 0)
        ]
        if 2 * windows <= len(self._waited):
            return None
        return self._words(rank, fmean(waited for other, waited in self._waited if other == rank))

    def _words(self, rank: int, waited: float) -> str:
        return f"rank {rank} ({self._hosts[rank]}): the others wait for it for {100 * waited:.0f}% of each step"


def straggler_of(own: Sequence[float], step: float) -> int | None:
    """The process that takes more than `SLOW` times the median for what it does by itself; None if there is none.

    Args:
        own: seconds of a step in which a process waits for nobody, by rank; of two, the median is the quicker.
        step: seconds of a whole step, of which the difference is to be `NOTABLE`.
    """
    slowest, usual = max(range(len(own)), key=own.__getitem__), median_low(own)
    return slowest if own[slowest] > SLOW * usual and own[slowest] - usual >= NOTABLE * step else None


def waiting(measured: Sequence[Measured]) -> tuple[int, float]:
    """Which of several processes is the slowest at its own work, and how long the others wait, as a share of a step."""
    alone = [m.seconds_of(_ALONE) for m in measured]
    slowest = max(range(len(alone)), key=alone.__getitem__)
    others = fmean(seconds for rank, seconds in enumerate(alone) if rank != slowest)
    return slowest, (alone[slowest] - others) / fmean(m.step for m in measured)

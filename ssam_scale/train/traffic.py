"""What a step sends to the other processes, counted once at the beginning of a run."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from ssam_scale.perturbation import StepKind, StepReport
from ssam_scale.sharding.collectives import Traffic
from ssam_scale.tracking.run import WARMUP_STEPS, Run

from .hooks import Hook

if TYPE_CHECKING:
    from .batches import EpochBatches
    from .progress import Progress

_FIRST = 3
"""Of the steps that are counted: DDP and ZeRO 3 settle what they send together in those before."""


class LogTraffic(Hook):
    """Records what one step of each kind sends, as `comm/<kind>/<collective>_mib` and `comm/<kind>/calls`.

    Counted in steps that say nothing about the time of the others anyway, as counting slows them down. Bytes are those
    of one process, by `sharding.collectives`.

    Args:
        run: where.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._counting = ExitStack()
        self._traffic: Traffic | None = None
        self._known: set[StepKind] = set()
        self._done = 0

    def before_step(self, progress: Progress, batches: EpochBatches) -> None:
        """Begins to count."""
        self._done += 1
        if _FIRST <= self._done <= WARMUP_STEPS:
            self._traffic = self._counting.enter_context(Traffic(strict=False))

    def after_step(self, progress: Progress, report: StepReport) -> None:
        """Records what is new."""
        self._counting.close()
        if self._traffic is not None and report.kind not in self._known:
            self._known.add(report.kind)
            found = {f"{name}_mib": sent / 2**20 for name, sent in self._traffic.bytes.items()}
            found["calls"] = self._traffic.calls.total()
            self._run.log({f"comm/{report.kind}/{name}": value for name, value in found.items()}, progress.step)
        self._traffic = None

    def on_end(self, error: BaseException | None) -> None:
        """Stops counting a step that failed."""
        self._counting.close()

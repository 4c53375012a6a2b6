"""Profiling of the ascent pass: its time with the cut at each block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from ssam_scale.clock import Clock, clock_of
from ssam_scale.masks import Plan

from .batchnorm import frozen_statistics
from .loss import LossFn
from .phases import Phase
from .resolved_step import resolve_step
from .sparse_sam import SparseSAM

_COUNTED = ("ascent forward", "ascent backward")


class _AscentTimer:
    """Adds up the device's time in the phases of an ascent pass."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._spans: list[tuple[Any, Any]] = []

    @contextmanager
    def __call__(self, phase: Phase) -> Iterator[None]:
        start = self._clock.mark()
        yield
        if phase in _COUNTED:
            self._spans.append((start, self._clock.mark()))

    def seconds(self) -> float:
        """So far; waits for the device."""
        self._clock.wait(self._spans[-1][1])
        return sum(self._clock.seconds(start, end) for start, end in self._spans)


def ascent_seconds(opt: SparseSAM, loss_fn: LossFn, *batches: Any, repeats: int = 3) -> list[float]:
    """Measure the ascent pass with the cut at each block, in seconds, for `DepthByCost`. Collective.

    Each is forward, backward and reduction of the suffix as a step makes them, over `batches` as micro-batches and with
    the optimizer's `direction`. As in a step, the prefix counts only where it is not shared with the descent, which is
    with several micro-batches. All processes take part, and are told what the first one measured.

    Costs (1 + repeats) · blocks ascents. Gradients are cleared before and after; weights, BatchNorm statistics and the
    random state stay as they were.

    Args:
        opt: with a model in stages.
        loss_fn: as `SparseSAM.step` takes it.
        batches: the micro-batches of this process.
        repeats: rounds over all cuts, after one to warm up. The least time counts: what disturbs one only adds to it.

    Returns:
        Seconds for the cut at each block, the same on every process.

    Raises:
        ValueError: `repeats` is not positive, or there is no batch.
    """
    if repeats < 1 or not batches:
        raise ValueError(f"{len(batches)} batches and {repeats} repeats; at least 1 of each is needed")
    sharding, layout = opt.sharding, opt.parameters.layout
    device = opt.parameters.device
    measured: list[list[float]] = [[] for _ in range(layout.depth)]
    with (
        frozen_statistics(sharding.network),
        torch.random.fork_rng([torch.cuda.current_device()] if device.type == "cuda" else []),
        torch.enable_grad(),
    ):
        for _ in range(1 + repeats):
            for cut, seconds in enumerate(measured):
                timer = _AscentTimer(clock_of(device))
                opt.zero_grad()
                try:
                    suffix = [name for name, stage in layout.stages.items() if stage >= cut]
                    plan = replace(Plan.of_parameters(layout, suffix), cut=cut, may_cut=True)
                    resolved = resolve_step(
                        plan,
                        opt.options,
                        opt.parameters,
                        radii=dict.fromkeys(plan.weights, 1.0),
                        micro_batches=len(batches),
                        packs=sharding.packs_gradients,
                    )
                    opt.passes(resolved, loss_fn, batches, None, timer).ascend()
                finally:
                    opt.zero_grad()
                seconds.append(timer.seconds())
    own = [min(seconds[1:]) for seconds in measured]
    first: list[float] = sharding.data_parallel_group.all_gather_object(own)[0]
    return first

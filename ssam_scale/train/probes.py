"""Probes: steps of the base optimizer and of dense SAM, timed beside the run's own on the batch that comes next."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from ssam_scale.clock import timed
from ssam_scale.config.schema import Config
from ssam_scale.perturbation import Rehearsed
from ssam_scale.sharding import World
from ssam_scale.tracking.meters import forget_peak
from ssam_scale.tracking.run import WARMUP_STEPS, Run
from ssam_scale.tracking.saving import Probe, order_of

from .hooks import Hook
from .memory import FLOAT

if TYPE_CHECKING:
    from .batches import EpochBatches
    from .build import Components
    from .progress import Progress, ProgressBar

SHARE = 0.01
"""Of the time of training that probes may take, where `tracking.probe_every` is `auto`."""

_KINDS: tuple[Rehearsed, ...] = ("base", "dense", "own")

# What the first probe and a second one cost, in own steps at the most: a warm-up and two measurements of 1 + 2 + 2.
_FIRST = 15


class ProbeSaving(Hook):
    """Times a base, a dense and an own step before some of the steps; nothing of training changes.

    The passes are run in a random order on the batch that is trained on next, waiting for the device only here, and
    everything is put back (`SparseSAM.rehearsal`). What the probes take is no time of a step, and the seconds are told
    to `log_epoch`'s time as `paused`.

    Args:
        config: of the run.
        world: the processes.
        components: what is trained.
        run: where a probe is recorded.
        bar: tells why there are none.

    Attributes:
        paused: seconds of all probes so far.
    """

    doing = "a probe of the saving"

    def __init__(self, config: Config, world: World, components: Components, run: Run, bar: ProgressBar) -> None:
        self._config, self._world, self._components, self._run, self._bar = config, world, components, run, bar
        self.paused = 0.0
        self._every = config.tracking.probe_every if config.tracking.trackers else None  # nobody would know
        first = self._every if isinstance(self._every, int) else WARMUP_STEPS
        self._next: int | None = components.progress.step + first
        self._warm = False
        steps = components.progress.length.steps - components.progress.place
        if self._every is None:
            self._give_up("tracking.probe_every is null")
        elif self._every == "auto" and steps < _FIRST / SHARE:
            self._give_up(f"{steps} steps are too few for probes of 1% (tracking.probe_every asks for them)")

    def before_step(self, progress: Progress, batches: EpochBatches) -> None:
        """Probes, if one is due. Collective then."""
        if self._next is None or progress.step < self._next:
            return
        with timed(self._world.device) as all_of_it:
            if not self._warm and not self._fits():
                self._give_up("dense SAM's backup of all weights does not fit into memory beside this run")
                return
            probe = self._probe(progress.step, batches)
        forget_peak(self._world.device)  # dense SAM's backup is none of this run's
        cost = self._mean(all_of_it.seconds)
        self.paused += all_of_it.seconds
        if self._every == "auto":
            self._next = progress.step + math.ceil(cost / (SHARE * self._mean(probe.own)))
        else:
            assert isinstance(self._every, int)
            self._next = progress.step + self._every
        self._run.log_probe(probe, seconds=all_of_it.seconds, step=progress.step)

    def _probe(self, step: int, batches: EpochBatches) -> Probe:
        components, device = self._components, self._world.device
        loaded = batches.peek()
        micro_batches = components.attached(loaded)
        seconds: dict[Rehearsed, float] = {}
        with components.opt.rehearsal() as rehearse:
            if not self._warm:  # kernels are chosen, memory is taken
                for kind in _KINDS:
                    rehearse(kind, components.loss_fn, *micro_batches)
                self._warm = True
            for kind in order_of(self._config.train.seed, step, _KINDS):
                self._together()
                with timed(device) as block:
                    rehearse(kind, components.loss_fn, *micro_batches)
                seconds[kind] = block.seconds
        reference = 0.0
        if components.trajectory is not None:
            self._together()
            with timed(device) as block:
                components.attached(loaded)
            reference = block.seconds
        return Probe(seconds["base"], seconds["dense"], seconds["own"], reference)

    def _fits(self) -> bool:
        """Whether every process has room for the weights that dense SAM would keep and this run's own steps do not."""
        device, opt = self._world.device, self._components.opt
        if device.type != "cuda":
            return True
        kept = opt.plan.perturbed / max(opt.parameters.layout.total, 1)
        shards = opt.sharding.resident(list(opt.parameters.by_name.values()))
        needed = FLOAT * (1.0 - kept) * sum(shard.numel() for shard in shards)
        free, _ = torch.cuda.mem_get_info(device)
        room = free + torch.cuda.memory_reserved(device) - torch.cuda.max_memory_allocated(device)
        return self._world.smallest(int(room - needed)) > 0

    def _together(self) -> None:
        """All processes have come here."""
        self._mean(0.0)

    def _mean(self, value: float) -> float:
        """Over the processes, so that all of them decide alike. Collective."""
        return float(self._world.sum(torch.tensor(value, device=self._world.device))) / self._world.size

    def _give_up(self, reason: str) -> None:
        self._next = None
        self._run.no_saving(reason)
        if self._every is not None:
            self._bar.say(f"the saving is not measured: {reason}")

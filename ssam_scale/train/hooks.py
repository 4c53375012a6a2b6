"""What watches a training run from the outside: layer densities and windows of metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ssam_scale.config.mask_sections import DepthMask
from ssam_scale.config.schema import Config
from ssam_scale.errors import UserError
from ssam_scale.perturbation import SparseSAM
from ssam_scale.sharding import World
from ssam_scale.tracking.run import Run
from ssam_scale.tracking.timer import PhaseTimer

from .build import chosen_section
from .progress import StepProgress


def track_fixed_layers(config: Config, opt: SparseSAM, run: Run) -> None:
    """Record what a mask perturbs of each layer that is neither chosen by scores nor drawn."""
    section = config.perturbation.mask if config.perturbation is not None else None
    if section is not None and chosen_section(config) is None and not _is_drawn(config):
        run.log_layers(opt.plan.counts, opt.parameters.layout.numels, step=0, steps="the same in every step")


class DrawnLayers:
    """What a mask that is drawn in each step perturbs of each layer, on average over an epoch.

    Args:
        config: of the run; with another mask everything in here does nothing.
    """

    def __init__(self, config: Config) -> None:
        self._wanted = _is_drawn(config)
        self._sums: dict[str, int] = {}
        self._steps = 0

    def add(self, opt: SparseSAM) -> None:
        """Note the next step."""
        if not self._wanted:
            return
        self._steps += 1
        counts: Mapping[str, int] = opt.plan.counts if any(opt.radii) else {}
        for name, count in counts.items():
            self._sums[name] = self._sums.get(name, 0) + count

    def record(self, opt: SparseSAM, run: Run, step: int) -> None:
        """Record the epoch that ends with `step`."""
        if self._steps:
            means = {name: total / self._steps for name, total in self._sums.items()}
            run.log_layers(
                means, opt.parameters.layout.numels, step=step, steps="mean over the epoch that ends with step"
            )


def _is_drawn(config: Config) -> bool:
    section = config.perturbation.mask if config.perturbation is not None else None
    return isinstance(section, DepthMask) and section.policy == "rotate"


class _Window:
    """Sums over the steps between two records, kept on the device so that no step waits for it."""

    def __init__(self, config: Config, world: World, phases: PhaseTimer, run: Run, progress: StepProgress) -> None:
        self._config, self._world, self._phases, self._run, self._progress = config, world, phases, run, progress
        self._losses: list[Tensor] = []
        self._densities: list[float] = []

    def add(self, loss: Tensor, density: float) -> None:
        """One step."""
        self._losses.append(loss)
        self._densities.append(density)

    def close(self, step: int, opt: SparseSAM, radius: float) -> None:
        """Record the steps since the last record, the last of which had this radius; collective."""
        lr = opt.param_groups[0]["lr"]
        loss = float(self._world.sum(torch.stack(self._losses).mean())) / self._world.size
        if not math.isfinite(loss):
            raise UserError(
                f"the loss became {loss} before step {step}; a lower optimizer.lr or perturbation.rho may help"
            )
        times = self._phases.drain()
        self._run.log_window(
            times,
            loss=loss,
            lr=lr,
            densities=self._densities,
            images_per_step=self._config.data.batch_size,
            step=step,
        )
        if self._config.perturbation is not None:
            self._run.log({"perturbation/rho": radius, "perturbation/skipped": opt.skipped}, step)
            kappa = float(opt.kappa)
            if not math.isnan(kappa):  # not known, or the gradient was not finite
                self._run.log({"perturbation/kappa": kappa}, step)
        if opt.scaler is not None:
            self._run.log({"train/loss_scale": opt.scaler.get_scale()}, step)
        self._progress.show(f"loss {loss:.3f}, lr {lr:.2g}, {self._config.data.batch_size / times.step:.0f} images/s")
        self._losses.clear()
        self._densities.clear()

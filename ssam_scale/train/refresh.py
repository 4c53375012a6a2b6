"""The configured mask: made from its section, chosen anew when it is due, by the images that are trained on next."""

from __future__ import annotations

import csv
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ssam_scale.config.schema import Config
from ssam_scale.data import Batch, ImageLoader
from ssam_scale.errors import UserError
from ssam_scale.masks import (
    DepthByCost,
    Refreshed,
    ScoreBased,
)
from ssam_scale.perturbation import SparseSAM, ascent_seconds
from ssam_scale.perturbation.scores import sampled_label_loss
from ssam_scale.sharding import World
from ssam_scale.tracking.run import Run

from .build import Parts, chosen_section, soft_loss


def time_ascents(config: Config, world: World, parts: Parts, batches: EpochBatches) -> None:
    """Measure ascents for a mask that is drawn by cost and has no times yet. Collective.

    A resumed run has those of its checkpoint, so that its cuts are drawn as without a break.

    Args:
        config: of the run.
        world: the processes.
        parts: of the run.
        batches: of the epoch that begins; what one step takes is looked at, and stays where it is.
    """
    mask = parts.opt.mask
    if isinstance(mask, DepthByCost) and mask.seconds is None:
        coming = batches.ahead(config.data.batch_size // world.size)
        mask.seconds = ascent_seconds(parts.opt, soft_loss(config, parts.precision), *coming)


def fewest_samples(config: Config, steps_per_epoch: int, images: int) -> int | None:
    """How few images a refresh of the run may find left in its epoch; None where no refresh misses any.

    A refresh is by the images that are trained on next, up to the end of the epoch. Those that begin an epoch have all
    of it, those by `refresh_steps` may come late.

    Args:
        config: of the run.
        steps_per_epoch: optimizer steps in one epoch.
        images: in one epoch, over all processes.
    """
    section = chosen_section(config)
    if section is None or not section.by_samples or section.refresh_steps is None:
        return None
    steps = range(0, config.train.epochs * steps_per_epoch, section.refresh_steps)
    fewest = images - max(step % steps_per_epoch for step in steps) * config.data.batch_size
    return fewest if fewest < section.samples else None


class EpochBatches:
    """One epoch's batches of this process, which can be looked at before they are taken.

    Args:
        loader: of the training images, its epoch chosen.
    """

    def __init__(self, loader: ImageLoader) -> None:
        self._coming = iter(loader)
        self._seen: deque[Batch] = deque()

    def __next__(self) -> Batch:
        return self._seen.popleft() if self._seen else next(self._coming)

    def ahead(self, samples: int) -> list[Batch]:
        """The next batches, which stay where they are: as many as hold `samples`, or all that the epoch has left."""
        while sum(len(batch.labels) for batch in self._seen) < samples:
            batch = next(self._coming, None)
            if batch is None:
                break
            self._seen.append(batch)
        taken: list[Batch] = []
        while samples > 0 and len(taken) < len(self._seen):
            taken.append(self._seen[len(taken)])
            samples -= len(taken[-1].labels)
        return taken

    def close(self) -> None:
        """End the loader's iteration."""
        self._coming.close()


def refresh_if_due(config: Config, world: World, opt: SparseSAM, batches: EpochBatches, run: Run | None) -> None:
    """Choose the mask anew before the next step, where that is due. Collective.

    Scores of samples are of the images that the following steps train on, as the loader gives them: neither mixed nor
    smoothed. Fewer than `samples` are left at the end of an epoch; then it is those.

    Raises:
        UserError: the scores are not finite, or nothing would be perturbed.
    """
    section = chosen_section(config)
    mask: object = opt.mask
    if section is None or not isinstance(mask, Refreshed) or not opt.refresh_is_due:
        return
    coming: list[Batch] = []
    samples = None
    if {"fisher", "gradient"} & set(mask.wanted()):
        # The processes' batches are of one size.
        coming = batches.ahead(-(-section.samples // world.size))
        samples = min(section.samples, sum(len(batch.labels) for batch in coming) * world.size)
    began = time.monotonic()
    try:
        opt.refresh(_LOSSES[section.labels], *coming, samples=samples)
    except ValueError as error:
        raise UserError(f"perturbation.mask: {error}") from error
    except FloatingPointError as error:
        raise UserError(
            f"perturbation.mask: {error} before step {opt.steps + 1}; a lower optimizer.lr or perturbation.rho may help"
        ) from error
    if run is None:
        return
    seconds = time.monotonic() - began
    if isinstance(mask, DepthByCost):
        run.log_refresh(seconds=seconds, step=opt.steps, samples=samples)
        _log_cuts(mask, opt, run)
    elif isinstance(mask, ScoreBased):
        run.log_refresh(
            seconds=seconds,
            step=opt.steps,
            density=opt.plan.perturbed / opt.parameters.layout.total,
            turnover=mask.turnover,
            samples=samples,
        )
        run.log_layers(opt.plan.counts, opt.parameters.layout.numels, step=opt.steps, steps="refreshed after step")


def _log_cuts(mask: DepthByCost, opt: SparseSAM, run: Run) -> None:
    """Store what the next steps' cuts are drawn by as `mask/cuts/step_<steps done>.csv`: a row for each block."""
    assert mask.masses is not None
    assert mask.seconds is not None
    probabilities = mask.probabilities(opt.parameters.layout.depth, opt.steps)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"step_{opt.steps:08d}.csv"
        with path.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["block", "fisher_mass", "ascent_seconds", "probability"])
            rows = zip(mask.masses, mask.seconds, probabilities, strict=True)
            writer.writerows([block, *(f"{value:.6g}" for value in row)] for block, row in enumerate(rows))
        run.log_artifact(path, "mask/cuts")


def _data_label_loss(forward: Any, batch: Batch) -> Tensor:
    """The loss of the empirical Fisher: true labels, neither mixed nor smoothed."""
    return F.cross_entropy(forward(batch[0]).float(), batch[1])


_LOSSES: dict[str, Callable[[Any, Any], Tensor]] = {"data": _data_label_loss, "sampled": sampled_label_loss}

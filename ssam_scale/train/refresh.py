"""Refreshing the mask when it is due, by scores of the images that are trained on next."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssam_scale.clock import timed
from ssam_scale.config.mask_sections import RefreshedMask
from ssam_scale.config.schema import Config
from ssam_scale.data import Batch
from ssam_scale.errors import UserError
from ssam_scale.masks import DepthByCost, Refreshed, ScoreBased
from ssam_scale.perturbation import SparseSAM, ascent_seconds
from ssam_scale.perturbation.scores import sampled_label_loss
from ssam_scale.sharding import World
from ssam_scale.sharding.device import PRECISIONS
from ssam_scale.tracking.run import Run

from .batches import EpochBatches
from .hooks import Hook
from .length import Length
from .progress import Progress

if TYPE_CHECKING:
    from .build import Components


def refreshed_section(config: Config) -> RefreshedMask | None:
    """The mask's section of the configuration, if the mask is chosen by scores."""
    section = config.perturbation.mask if config.perturbation is not None else None
    return section if isinstance(section, RefreshedMask) and section.scores else None


def fewest_samples(config: Config, length: Length, images: int) -> int | None:
    """The fewest images that a refresh of the run may find left in its epoch; None where every refresh finds enough.

    A refresh is by the images that are trained on next, up to the end of the epoch. Those that begin an epoch have all
    of it, those by `refresh_steps` may come late.

    Args:
        config: of the run.
        length: of the run.
        images: in one epoch, over all processes.
    """
    section = refreshed_section(config)
    if section is None or not section.by_samples or section.refresh_steps is None:
        return None
    steps = range(0, length.steps, section.refresh_steps)
    fewest = images - max(step % length.steps_per_epoch for step in steps) * config.data.batch_size
    return fewest if fewest < section.samples else None


class RefreshMask(Hook):
    """Refreshes the mask before the steps in which that is due.

    Scores of samples are of the images that the following steps train on, as the loader gives them: neither mixed nor
    smoothed. Where fewer than `samples` are left in the epoch, it is those. A cut drawn by cost also needs the time of
    an ascent from each block on, which is measured before the first step; a resumed run has those of its checkpoint, so
    that it draws the same cuts as without a break.

    Where there are several within `tracking.log_every` steps, such as ESAM's in each, only one of them is recorded: it
    is timed, for which the device is waited for.

    Args:
        config: of the run, with a mask that is chosen by scores.
        world: the processes.
        components: what is trained.
        run: where refreshes are recorded.
    """

    doing = "the refresh of the mask"

    def __init__(self, config: Config, world: World, components: Components, run: Run) -> None:
        section = refreshed_section(config)
        assert section is not None
        self._section, self._world, self._run = section, world, run
        self._opt, self._loss_fn = components.opt, components.loss_fn
        self._score_loss = _in_precision(_LOSSES[section.labels], PRECISIONS[config.train.precision])
        self._local_batch = config.data.batch_size // world.size
        self._log_every = config.tracking.log_every if config.tracking is not None else 1
        self._since = 0  # refreshes since one was recorded

    def before_step(self, progress: Progress, batches: EpochBatches) -> None:
        """Collective.

        Raises:
            UserError: the scores are not finite, or nothing would be perturbed.
        """
        mask: object = self._opt.mask
        if isinstance(mask, DepthByCost) and mask.seconds is None:
            mask.seconds = ascent_seconds(self._opt, self._loss_fn, *batches.ahead(self._local_batch))
        if isinstance(mask, Refreshed) and self._opt.refresh_is_due:
            scored, samples = self._scored(mask, batches)
            self._since += 1
            if mask.every is not None and progress.step % self._log_every >= mask.every:
                self._refresh(scored, samples, progress.step)
                return
            with timed(self._world.device) as refresh:
                self._refresh(scored, samples, progress.step)
            self._record(refresh.seconds, samples, progress.step)
            self._since = 0

    def _scored(self, mask: Refreshed, batches: EpochBatches) -> tuple[list[Batch], int | None]:
        """The batches to score on this process, and how many images of all processes; none if scores are not of images.

        The processes' batches are of one size.
        """
        if not mask.needs_samples():
            return [], None
        scored = batches.ahead(-(-self._section.samples // self._world.size))
        return scored, min(self._section.samples, sum(len(batch.labels) for batch in scored) * self._world.size)

    def _refresh(self, scored: list[Batch], samples: int | None, step: int) -> None:
        try:
            self._opt.refresh(self._score_loss, *scored, samples=samples)
        except ValueError as error:
            raise UserError(f"perturbation.mask: {error}") from error
        except FloatingPointError as error:
            raise UserError(
                f"perturbation.mask: {error} before step {step + 1}; a lower optimizer.lr or perturbation.rho may help"
            ) from error

    def _record(self, seconds: float, samples: int | None, step: int) -> None:
        opt, run = self._opt, self._run
        mask: object = opt.mask
        if isinstance(mask, DepthByCost):
            run.log_refresh(seconds=seconds, step=step, refreshes=self._since, samples=samples)
            _log_cuts(mask, opt, run, step)
        elif isinstance(mask, ScoreBased):
            layout = opt.parameters.layout
            run.log_refresh(
                seconds=seconds,
                step=step,
                refreshes=self._since,
                density=opt.plan.perturbed / layout.total,
                turnover=mask.turnover,
                samples=samples,
            )
            run.log_layers(opt.plan.counts, layout.numels, step=step, steps="refreshed after step")


def _log_cuts(mask: DepthByCost, opt: SparseSAM, run: Run, step: int) -> None:
    """Store what the next steps' cuts are drawn by as `mask/cuts/step_<steps done>.csv`: a row for each block."""
    assert mask.masses is not None
    assert mask.seconds is not None
    probabilities = mask.probabilities(opt.parameters.layout.depth, opt.steps)
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["block", "fisher_mass", "ascent_seconds", "probability"])
    rows = zip(mask.masses, mask.seconds, probabilities, strict=True)
    writer.writerows([block, *(f"{value:.6g}" for value in row)] for block, row in enumerate(rows))
    run.log_text(table.getvalue(), f"mask/cuts/step_{step:08d}.csv")


def _data_label_loss(forward: Any, batch: Batch) -> Tensor:
    """The loss of the empirical Fisher: true labels, neither mixed nor smoothed."""
    return F.cross_entropy(forward(batch[0]).float(), batch[1])


def _in_precision(loss_fn: Callable[[Any, Any], Tensor], precision: torch.dtype) -> Callable[[Any, Any], Tensor]:
    """`loss_fn` by autocast, as training is: a backend that gathers weights in low precision computes in no other."""

    def autocast(forward: Any, batch: Batch) -> Tensor:
        with torch.autocast(batch[0].device.type, precision, enabled=precision != torch.float32):
            return loss_fn(forward, batch)

    return autocast


_LOSSES: dict[str, Callable[[Any, Any], Tensor]] = {"data": _data_label_loss, "sampled": sampled_label_loss}

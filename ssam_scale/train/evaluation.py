"""Accuracy that is exact however many processes measure it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssam_scale.config.schema import Config
from ssam_scale.folders import RESULT
from ssam_scale.perturbation.batchnorm import evaluation_mode
from ssam_scale.sharding import World
from ssam_scale.tracking.run import Run

from .agreement import Agreement, Asked
from .hooks import Hook
from .progress import Progress, ProgressBar

if TYPE_CHECKING:
    from .build import Components


@dataclass(frozen=True)
class Evaluation:
    """Results over `images` images.

    Attributes:
        top1: images whose label scores highest, percent.
        top5: images whose label is among the five highest scores, percent; None with five classes or fewer, of which
            it would be all.
        loss: mean cross-entropy.
        images: how many were measured.
    """

    top1: float
    top5: float | None
    loss: float
    images: int

    def __str__(self) -> str:
        top5 = "" if self.top5 is None else f"top-5 {self.top5:.2f}%, "
        return f"top-1 {self.top1:.2f}%, {top5}validation loss {self.loss:.4f}"


def write_result(config: Config, progress: Progress, result: Evaluation) -> None:
    """Write the last evaluation beside the checkpoints, whole or not at all: it stays where no store is.

    Raises:
        OSError: it cannot be written.
    """
    said = {**asdict(result), "epochs": progress.epochs, "steps": progress.step, "run_id": progress.run_id}
    said = {"method": config.method, "model": config.model.name, **said, "stopped_early": progress.stopped_early}
    # JSON has no word for what is no number.
    said = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in said.items()}
    file = config.checkpoint.directory / RESULT
    partial = file.with_name(f".{RESULT}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(said, allow_nan=False))
        partial.replace(file)
    except OSError:
        with suppress(OSError):
            partial.unlink()
        raise


class EvaluationInterrupted(Exception):  # noqa: N818  no error
    """All processes have agreed to leave an evaluation."""


@torch.no_grad()
def evaluate(
    module: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    forwards: int,
    world: World,
    precision: torch.dtype,
    interrupted: Callable[[], bool] = lambda: False,
    flip: bool = False,
) -> Evaluation:
    """Evaluate `module` on all images of all processes.

    A sharded forward is collective, so every process runs as many forwards as the one with the most batches; what a
    process repeats for the sake of the others is not counted.

    Args:
        module: the distributed model; its mode is put back.
        batches: this process's images and labels, each image on exactly one process.
        forwards: number of batches of the process that has most of them.
        world: over whom to sum.
        precision: of the forward, by autocast unless float32.
        interrupted: asked before each forward, with the same answer on every process.
        flip: take the mean logits of each image and its mirror image.

    Raises:
        EvaluationInterrupted: the answer was yes.
    """
    totals = torch.zeros(4, dtype=torch.float64, device=world.device)  # top-1, top-5, loss, images
    with evaluation_mode(module):
        batch, done = None, 0
        for batch in batches:
            _leave_if(interrupted())
            totals += _measure(module, batch, precision, flip)
            done += 1
        for _ in range(done, forwards):
            _leave_if(interrupted())
            if batch is None:
                raise RuntimeError("a process has no image to evaluate; evaluate on fewer processes")
            _measure(module, batch, precision, flip)
    top1, top5, loss, images = world.sum(totals).tolist()
    top5 = None if math.isnan(top5) else 100.0 * top5 / images
    return Evaluation(100.0 * top1 / images, top5, loss / images, int(images))


class Evaluate(Hook):
    """Evaluates every `train.eval_epochs` epochs and after the last: averaged weights if there are any, and the raw.

    Args:
        config: of the run.
        world: the processes.
        components: what is evaluated.
        run: where results are recorded.
        bar: shows the way and the results.
        agreement: what processes ask for.
    """

    doing = "evaluation"

    def __init__(
        self, config: Config, world: World, components: Components, run: Run, bar: ProgressBar, agreement: Agreement
    ) -> None:
        self._config, self._world, self._components, self._run, self._bar = config, world, components, run, bar
        self._agreement = agreement
        self._last: tuple[int, Evaluation] | None = None

    def of(self, progress: Progress) -> Evaluation | None:
        """The evaluation of the weights as they are; None if there was none."""
        if self._last is None or self._last[0] != progress.step:
            return None
        return self._last[1]

    def between_epochs(self, progress: Progress) -> None:
        """Collective."""
        progress.unevaluated = False
        if not progress.ended and progress.epoch % self._config.train.eval_epochs:
            return
        ema = self._components.ema
        try:
            with ema.swapped_in() if ema is not None else nullcontext():
                result = self._evaluate("evaluating")
            raw = None if ema is None else self._evaluate("evaluating without averaging")
        except EvaluationInterrupted:
            progress.unevaluated = True
            return
        self._last = progress.step, result
        if (stop := self._config.train.early_stop) is not None:
            progress.patience.observe(self._world.first_says(getattr(result, stop.metric)), progress.step)
        self._run.log_evaluation(
            top1=result.top1,
            top5=result.top5,
            loss=result.loss,
            raw={} if raw is None else {"top1": raw.top1, "top5": raw.top5, "loss": raw.loss},
            epoch=progress.epochs,
            step=progress.step,
        )
        if progress.ended and self._world.first:
            try:
                write_result(self._config, progress, result)
            except OSError as error:  # the checkpoint has it as well
                file = self._config.checkpoint.directory / RESULT
                self._bar.say(f"{file} was not written: {error.strerror or error}")
        beside = "" if raw is None else f"; without averaging the weights: {raw}"
        self._bar.say(f"{progress}: {result} on {result.images} images{beside}")
        if progress.stopped_early:
            self._run.log({"train/stopped_early": 1.0}, progress.step)
            self._bar.say(str(progress.patience))

    def _evaluate(self, label: str) -> Evaluation:
        """Of the weights as they are."""
        loader, components = self._components.val, self._components
        forwards = loader.batches_everywhere
        batches = self._bar.track(loader, label, forwards)
        return evaluate(
            components.module,
            batches,
            forwards,
            self._world,
            components.precision,
            self._interrupted,
            self._config.data.eval_flip,
        )

    def _interrupted(self) -> bool:
        self._world.whereabouts.at(self.doing)  # before each batch: an evaluation may take longer than a wait
        return self._agreement(Asked(end=self._run.signals.received is not None)).end


def _leave_if(interrupted: bool) -> None:
    if interrupted:
        raise EvaluationInterrupted


@torch.no_grad()
def logits_of(module: nn.Module, images: Tensor, precision: torch.dtype, flip: bool = False) -> Tensor:
    """Logits as an evaluation counts them, float32 [N, classes].

    Args:
        module: in evaluation mode.
        images: normalised, [N, 3, H, W].
        precision: of the forward, by autocast unless float32.
        flip: take the mean logits of each image and its mirror image.
    """
    with torch.autocast(images.device.type, precision, enabled=precision != torch.float32):
        logits: Tensor = module(images).float()
        if flip:
            logits = 0.5 * (logits + module(images.flip(-1)).float())
    return logits


def _measure(module: nn.Module, batch: tuple[Tensor, Tensor], precision: torch.dtype, flip: bool) -> Tensor:
    images, labels = batch
    logits = logits_of(module, images, precision, flip)
    best = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
    loss = F.cross_entropy(logits, labels, reduction="sum")
    top5 = best.sum() if logits.shape[1] > 5 else loss.new_full((), math.nan)
    return torch.stack([best[:, 0].sum(), top5, loss, loss.new_full((), len(labels))]).double()

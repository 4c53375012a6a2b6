"""The training loop: epochs of steps, each evaluated, recorded and saved."""

from __future__ import annotations

import random
import time
from contextlib import closing

import torch

from ssam_scale.config.schema import Config
from ssam_scale.models import average_statistics
from ssam_scale.perturbation import no_phases
from ssam_scale.sharding import World
from ssam_scale.tracking.run import Run, open_run
from ssam_scale.tracking.timer import PhaseTimer

from . import checkpoint
from .build import Parts, build, soft_loss
from .evaluation import Evaluation, evaluate
from .hooks import DrawnLayers, _Window, track_fixed_layers
from .progress import StepProgress
from .refresh import EpochBatches, fewest_samples, refresh_if_due, time_ascents


def train(config: Config, world: World) -> None:
    """Train as configured, from the checkpoint that `checkpoint.resume` names if it names one.

    A run is a function of its configuration: order, augmentation, mixing, dropout and masks are seeded by the epoch, so
    a resumed run goes on exactly as an uninterrupted one.

    Raises:
        UserError: what the configuration asks for cannot be had.
    """
    phases = PhaseTimer(world.device)
    parts = build(config, world, phases)
    start = checkpoint.Progress()
    if (path := checkpoint.resolve(config)) is not None:
        start = checkpoint.load(path, config, parts.network, parts.opt, parts.average)
    else:
        checkpoint.refuse_to_mix(config)
    total = config.train.epochs * parts.steps_per_epoch
    with (
        open_run(config, enabled=world.first, resume_run_id=start.run_id, extra_tags={"steps": str(total)}) as run,
        StepProgress(total, start.step, world.first) as progress,
    ):
        progress.say(
            f"{config.method} {config.model.name}: {config.train.epochs} epochs of {parts.steps_per_epoch} steps of "
            f"{config.data.batch_size} images on {world.size} process(es), {world.device.type}"
        )
        fewest = fewest_samples(config, parts.steps_per_epoch, parts.train.images * world.size)
        if fewest is not None:
            progress.say(
                f"perturbation.mask.samples: a refresh near the end of an epoch scores what is left of it, {fewest} "
                "images at the least (metric mask/samples)"
            )
        track_fixed_layers(config, parts.opt, run)
        if path is not None:
            progress.say(f"resumed from {path} after epoch {start.epoch}")
        for epoch in range(start.epoch, config.train.epochs):
            began = time.monotonic()
            _train_epoch(config, world, parts, epoch, phases, run, progress)
            done, last = epoch + 1, epoch + 1 == config.train.epochs
            step = done * parts.steps_per_epoch
            average_statistics(parts.network, world)
            if parts.average is not None:
                with parts.average.swapped_in():
                    average_statistics(parts.network, world)
            run.log_epoch(epoch=done, seconds=time.monotonic() - began, step=step)
            if last or done % config.train.eval_epochs == 0:
                result = _evaluate(parts, world, progress)
                run.log_evaluation(top1=result.top1, top5=result.top5, loss=result.loss, epoch=done, step=step)
                progress.say(
                    f"epoch {done}/{config.train.epochs}: top-1 {result.top1:.2f}%, top-5 {result.top5:.2f}%, "
                    f"validation loss {result.loss:.4f} on {result.images} images"
                )
            if last or done % config.checkpoint.every_epochs == 0:
                reached = checkpoint.Progress(done, step, run.id)
                checkpoint.save(config, world, parts.network, parts.opt, parts.average, reached)
        run.finish_summary()


def dry_run(config: Config, world: World) -> str:
    """Build everything, take one step, evaluate one batch; record and save nothing. Returns what was done, in a line.

    Raises:
        UserError: what the configuration asks for cannot be had.
    """
    parts = build(config, world, no_phases)
    if (path := checkpoint.resolve(config)) is not None:
        checkpoint.load(path, config, parts.network, parts.opt, parts.average)
    parts.train.set_epoch(0)
    with closing(EpochBatches(parts.train)) as batches:
        time_ascents(config, world, parts, batches)
        refresh_if_due(config, world, parts.opt, batches, None)
        micro = [parts.mix(*next(batches)) for _ in range(config.train.accumulation)]
        parts.scheduler.step_update(0)
        loss = parts.opt.step(soft_loss(config, parts.precision), *micro)
    with closing(iter(parts.val)) as batches:
        evaluate(parts.module, [next(batches)], 1, world, parts.precision)
    return (
        f"dry run: {config.method} {config.model.name}, one step of {config.train.accumulation} micro-batch(es) of "
        f"{len(micro[0][0])} images on each of {world.size} process(es), loss {float(loss):.4f}; "
        f"an epoch has {parts.steps_per_epoch} steps"
    )


def _train_epoch(
    config: Config, world: World, parts: Parts, epoch: int, phases: PhaseTimer, run: Run, progress: StepProgress
) -> None:
    torch.manual_seed(random.Random(f"{config.train.seed} {epoch} {world.rank}").getrandbits(63))
    parts.train.set_epoch(epoch)
    parts.module.train()
    loss_fn = soft_loss(config, parts.precision)
    window = _Window(config, world, phases, run, progress)
    drawn = DrawnLayers(config)
    with closing(EpochBatches(parts.train)) as batches:
        time_ascents(config, world, parts, batches)
        for index in range(parts.steps_per_epoch):
            step = epoch * parts.steps_per_epoch + index
            parts.scheduler.step_update(step)
            refresh_if_due(config, world, parts.opt, batches, run)
            with phases("data"):
                micro = [parts.mix(*next(batches)) for _ in range(config.train.accumulation)]
            density, radius = parts.opt.density, max(parts.opt.radii)
            drawn.add(parts.opt)
            loss = parts.opt.step(loss_fn, *micro)
            if parts.average is not None:
                parts.average.update()
            phases.step()
            progress.advance()
            window.add(loss, density)
            if (step + 1) % config.tracking.log_every == 0 or index == parts.steps_per_epoch - 1:
                window.close(step + 1, parts.opt, radius)
    drawn.record(parts.opt, run, (epoch + 1) * parts.steps_per_epoch)


def _evaluate(parts: Parts, world: World, progress: StepProgress) -> Evaluation:
    """Evaluate the averaged weights where there are any, else the weights."""
    with parts.averaged():
        forwards = parts.val.batches_everywhere
        batches = progress.track(parts.val, "evaluating", forwards)
        return evaluate(parts.module, batches, forwards, world, parts.precision)

"""The training loop: epochs of steps, and the hooks around them, which do everything else."""

from __future__ import annotations

import gc
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from ssam_scale.config.schema import Config
from ssam_scale.console import console
from ssam_scale.data import Images
from ssam_scale.errors import NotFiniteError
from ssam_scale.folders import RESULT
from ssam_scale.models import train_mode, unfreezes
from ssam_scale.perturbation import StepReport
from ssam_scale.perturbation.rng import seed_step
from ssam_scale.sharding import BACKENDS, World, released
from ssam_scale.tracking.run import Run, open_run, run_lines
from ssam_scale.tracking.system import watched_for
from ssam_scale.tracking.timer import PhaseTimer

from . import checkpoint
from .batches import EpochBatches
from .build import Components, backend_of, build, build_hooks
from .checkpoint import SaveCheckpoint
from .class_weights import ClassWeights, balanced
from .evaluation import evaluate, write_result
from .hooks import Hook, ending
from .length import Length, length_of
from .memory import explaining_out_of_memory
from .preflight import Preflight, preflight
from .progress import Progress, ProgressBar
from .refresh import fewest_samples


def train(config: Config, world: World) -> None:
    """Train as configured, from the checkpoint that `checkpoint.resume` names if it names one.

    A run is a function of its configuration: order, augmentation and masks are seeded by the epoch, mixing, dropout and
    whatever else is drawn by the step, so a resumed run goes on exactly as an uninterrupted one.

    Raises:
        UserError: what the configuration asks for cannot be had, or another job has the folder of checkpoints.
        Terminated: a signal has ended the run; its exit code says whether it was saved.
    """
    found = preflight(config, world)
    notes = found.notes()
    of_data = _OfData.of(config, found.data["data.train"])
    with checkpoint.locked(config, world):
        goes_on = _train(config, world, of_data, found, notes)
        while goes_on:
            gc.collect()  # what was trained with is built anew
            goes_on = _train(_going_on(config), world, of_data, found, [], started=False)


@dataclass(frozen=True)
class _OfData:
    """What only the configuration and its images together say of a run.

    Attributes:
        length: how long it is.
        class_weights: that `balanced` comes to; None: the configuration has something else.
    """

    length: Length
    class_weights: ClassWeights | None

    @classmethod
    def of(cls, config: Config, images: Images) -> _OfData:
        """Of a run on the images that `data.train` names.

        Raises:
            UserError: they do not suit it.
        """
        return cls(length_of(config, images.images), balanced(config, images))

    def put_into(self, config: Config) -> Config:
        """The configuration with numbers where it leaves them to the data."""
        return config if self.class_weights is None else self.class_weights.put_into(config)


def _train(
    given: Config, world: World, of_data: _OfData, found: Preflight, notes: Sequence[str], *, started: bool = True
) -> bool:
    """Train to the end, or to where the run goes on from the newest checkpoint.

    Args:
        given: the configuration, as it is recorded.
        world: the processes.
        of_data: what the images say of the run.
        found: before anything was built.
        notes: lines to print first.
        started: whether a job has started with this; else it goes on.

    Returns:
        Whether it goes on, with all that is trained with built anew: because it has to go back, or because the next
        epoch trains more parameters, of which backends must know from the start.
    """
    config, length = of_data.put_into(given), of_data.length
    path, passed_over = checkpoint.resolve(config, world)
    notes = [*notes, *passed_over]
    out = console(quiet=not world.first)
    _print_lines(out, [describe(config, world), *notes])
    if path is None:
        checkpoint.check_fresh_directory(config)
        checkpoint.forget_rollbacks(config.checkpoint.directory)
    elif (done := checkpoint.finished(path, config, length)) is not None:
        # The tracked run stays as it ended, with its duration.
        out.print(f"{path} is of {_last_place(done)}: nothing is left to train", soft_wrap=True)
        if world.first:
            _print_lines(out, run_lines(config, done.run_id))
            if not (config.checkpoint.directory / RESULT).exists() and (last := checkpoint.evaluation_of(path)):
                with suppress(OSError):  # a full disk, as it may have been when the run ended
                    write_result(config, done, last)
        return False
    if started:
        checkpoint.note_start(config, world, path)
    predicted, unpredicted = _predicted(config, world)
    phases = PhaseTimer(world.device, entered=world.whereabouts.at)
    components = _build(config, world, phases, length, path)
    if (reshuffled := checkpoint.Rollbacks.of(config.checkpoint.directory, world).reshuffled) and path is not None:
        components.train.reshuffle(reshuffled)
    if path is not None and world.first:
        for left in checkpoint.set_aside(config.checkpoint.directory, path):
            out.print(f"{left}: set aside, because the run goes on from {path}", soft_wrap=True)
    split = components.split
    progress, total = components.progress, length.steps
    with (
        released(components.module),
        open_run(
            given,
            enabled=world.first,
            resume_run_id=progress.run_id,
            step=progress.step,
            gpus=world.size if world.device.type == "cuda" else 0,
            extra_tags={
                "steps": str(progress.step + max(0, total - progress.place)),
                "steps_per_epoch": str(components.steps_per_epoch),
                "backend": backend_of(config, world),
                "loader_workers": str(components.train.workers.count),
                **unpredicted,
            },
            # What the configuration leaves to the number of processes, or to the device's memory.
            extra_params={"train.accumulation": str(split.accumulation), "train.micro_batch": str(split.images)},
        ) as run,
        ProgressBar(total, progress.place, world.first) as bar,
    ):
        progress.run_id = run.id or progress.run_id  # so that MLflow goes on with it, should it be asked for again
        _announce(config, world, components, bar, path, found)
        for context, key in (("training", "data.train"), ("validation", "data.val")):
            run.log_data(found.data[key], context=context, side=config.data.resolution)
        run.log(predicted, progress.step)
        if of_data.class_weights is not None:
            bar.say(str(of_data.class_weights))
            run.log_text(of_data.class_weights.table(), "class_weights.csv")
        hooks = build_hooks(config, world, components, phases, run, bar)
        try:
            with (
                ending(hooks),
                explaining_out_of_memory(config, split),
                _machines_watched(config, world, run),
                run.signals.deferred(),  # SaveCheckpoint acts on them, between two steps
                # Inside of the tracked run, which is marked by it, and where a launcher's signal does not cut it short.
                world.naming_the_lost(),
            ):
                if progress.unevaluated:
                    _between_epochs(world, components, hooks)
                while not progress.ended:
                    _train_epoch(config, world, components, hooks, phases)
                    if not progress.ended and unfreezes(config.model.freeze, progress.epoch):
                        raise _TrainsMoreError
        except _TrainsMoreError:
            return True
        except NotFiniteError as error:
            count, line = _note_rollback(config, world, error)
            run.log({"train/rollbacks": float(count)}, progress.step)
            bar.say(line)
            return True
    if world.first:
        _print_lines(
            out, [f"last checkpoint: {checkpoint.newest(config.checkpoint.directory)}", *run.interface_lines()]
        )
    return False


def _last_place(done: Progress) -> str:
    """Where a complete run has ended, in words."""
    where = f"epoch {done.epoch}" if done.length.in_epochs else f"step {done.step}"
    return f"{where}, where the run has stopped early" if done.stopped_early else f"{where}, the last"


class _TrainsMoreError(Exception):
    """The next epoch trains more parameters."""


def _note_rollback(config: Config, world: World, error: NotFiniteError) -> tuple[int, str]:
    """Note where a run goes back to, whose order is another from there on. Collective.

    Returns:
        How often it has gone back, and a line that says so.

    Raises:
        NotFiniteError: it does not: by its configuration, or it has too often, or there is no checkpoint.
    """
    section, directory = config.train, config.checkpoint.directory
    if section.on_nonfinite != "rollback":
        raise error
    rollbacks = checkpoint.Rollbacks.of(directory, world)
    if len(rollbacks.places) >= section.max_rollbacks:
        raise NotFiniteError(f"{error}; going back {len(rollbacks.places)} times has not (train.max_rollbacks)")
    path, _ = checkpoint.resolve(_going_on(config), world)
    if path is None:
        raise NotFiniteError(f"{error}; there is no checkpoint to go back to yet")
    rollbacks = rollbacks.and_to(*checkpoint.place_in_data(path))
    if world.first:
        rollbacks.write(directory)
    count = len(rollbacks.places)
    return count, f"{error}; going back to {path} ({count} of {section.max_rollbacks}), and on in another order"


def _going_on(config: Config) -> Config:
    """The run that goes on from its newest checkpoint."""
    return config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"resume": "auto"})})


def _predicted(config: Config, world: World) -> tuple[dict[str, float], dict[str, str]]:
    """What the cost model says of the run, if there are times for it; and else the tag that says so.

    Raises:
        UserError: they are of something else.
    """
    if config.method == "base":
        return {}, {}
    if config.tracking.cost_times is None:
        return {}, {"predicted": "unknown: tracking.cost_times names no file of `ssam-scale cost --save-times`"}
    from .predict_cost import predicted  # with all of the cost model, which no training needs

    return predicted(config, world.size), {}


def _machines_watched(config: Config, world: World, run: Run) -> AbstractContextManager[object]:
    """Every machine of the job recorded in the one run, by its first process. Collective."""
    section = config.tracking
    if not section.system_metrics:
        return nullcontext()
    node = socket.gethostname() if world.nodes > 1 else None
    run_id = world.first_says(run.id)
    if world.first:
        return run.watch_machine(node)
    if node is None or run_id is None or section.store is None or not world.first_of_node:
        return nullcontext()
    return watched_for(section.store, run_id, node)


def _print_lines(out: Console, lines: Sequence[str]) -> None:
    for line in lines:
        out.print(line, soft_wrap=True)  # a command that is to be copied must not be broken


def dry_run(config: Config, world: World) -> str:
    """Build everything, take one step, evaluate one batch; record and save nothing. Returns what was done, and notes.

    Raises:
        UserError: what the configuration asks for cannot be had.
    """
    found = preflight(config, world)
    notes = found.notes()
    of_data = _OfData.of(config, found.data["data.train"])
    config, length = of_data.put_into(config), of_data.length
    path, passed_over = checkpoint.resolve(config, world)
    what = describe(config, world)
    if path is None:
        checkpoint.check_fresh_directory(config)
    elif (done := checkpoint.finished(path, config, length)) is not None:
        return f"dry run: {path} is of {_last_place(done)}: nothing is left to train"
    _predicted(config, world)
    phases = PhaseTimer(world.device, entered=world.whereabouts.at)
    components = _build(config, world, phases, length, path)
    with open_run(config, enabled=False) as run, ProgressBar(1, 0, visible=False) as bar:
        hooks = build_hooks(config, world, components, phases, run, bar)
        hooks = [hook for hook in hooks if not isinstance(hook, SaveCheckpoint)]
        with (
            ending(hooks),
            explaining_out_of_memory(config, components.split),
            closing(_batches(config, world, components)) as batches,
        ):
            loss = _train_step(config, world, components, batches, hooks, phases).loss
    assert loss is not None
    with explaining_out_of_memory(config, components.split), closing(iter(components.val)) as batches:
        evaluate(components.module, [next(batches)], 1, world, components.precision)
    said = f"dry run: {what}, one step of {components.split}, loss {float(loss):.4f}; " + (
        f"an epoch has {length.steps_per_epoch} steps" if length.in_epochs else f"the run has {length}"
    )
    return "\n".join([*notes, *passed_over, *notes_on_data(config, found.data), said])


def _build(config: Config, world: World, phases: PhaseTimer, length: Length, path: Path | None) -> Components:
    """The components of a run, as the checkpoint that it goes on from has them, if there is one."""
    with explaining_out_of_memory(config):
        found, epoch = None, None
        if path is not None:
            epoch, seen = checkpoint.place_in_data(path)
            if seen or not unfreezes(config.model.freeze, epoch):  # what fitted before takes more memory now
                found = checkpoint.micro_batch_of(path, config, world)
        world.whereabouts.at("building")
        components = build(config, world, phases, length, found, epoch=epoch)
        if path is not None:
            world.whereabouts.at("loading a checkpoint")
            checkpoint.load(path, config, components)
    return components


def describe(config: Config, world: World) -> str:
    """What is trained, and where: the first line that a run prints. Collective."""
    processes = "1 process" if world.size == 1 else f"{world.size} processes"
    backend = backend_of(config, world)
    title, replicas = BACKENDS[backend].value.title, config.sharding.replicas
    how = f"{title} with {replicas} replicas" if replicas > 1 else title
    if config.sharding.backend not in ("auto", backend):
        how += f" (without a launcher there is nobody to share with: not {config.sharding.backend})"
    return (
        f"{config.method} {config.model.name} on {processes} of {world.nodes} node{'s'[: world.nodes > 1]}, {how}, "
        f"{world.devices()}, {config.train.precision}{', compiled' if config.train.compile else ''}"
    )


def _train_epoch(
    config: Config, world: World, components: Components, hooks: Sequence[Hook], phases: PhaseTimer
) -> None:
    with closing(_batches(config, world, components)) as batches:
        for _ in range(components.progress.steps_left):
            _train_step(config, world, components, batches, hooks, phases)
    components.progress.after_epoch()
    for hook in _noted(world, hooks):
        hook.after_epoch(components.progress)
    _between_epochs(world, components, hooks)


def _between_epochs(world: World, components: Components, hooks: Sequence[Hook]) -> None:
    for hook in _noted(world, hooks):
        hook.between_epochs(components.progress)


def _noted(world: World, hooks: Sequence[Hook]) -> Iterator[Hook]:
    """The hooks, each of which this process is in while it is called."""
    for hook in hooks:
        world.whereabouts.at(hook.doing)
        yield hook


def _train_step(
    config: Config,
    world: World,
    components: Components,
    batches: EpochBatches,
    hooks: Sequence[Hook],
    phases: PhaseTimer,
) -> StepReport:
    opt, progress = components.opt, components.progress
    world.whereabouts.begin_step(progress.step + 1)
    components.scheduler.step_update(progress.place)
    for hook in _noted(world, hooks):
        hook.before_step(progress, batches)
    with phases("data"):
        micro_batches = batches.next_step()
    with phases("reference") if components.trajectory is not None else nullcontext():
        micro_batches = components.attached(micro_batches)
    opt.step(components.loss_fn, *micro_batches)
    with phases("data"):
        batches.prefetch()
    report = opt.report
    assert report is not None
    progress.after_step()
    for hook in _noted(world, hooks):
        hook.after_step(progress, report)
    return report


def _batches(config: Config, world: World, components: Components) -> EpochBatches:
    """What is left of the epoch that goes on."""
    progress = components.progress
    components.train.set_epoch(progress.epoch, progress.seen)
    train_mode(components.module)
    epoch, first = progress.epoch, progress.step_of_epoch

    def begin(step: int) -> None:
        seed_step(world.device, config.train.seed, epoch, first + step, world.rank)
        if components.mix is not None:
            components.mix.begin(epoch, first + step)

    return EpochBatches(components.train, components.mix, components.split.accumulation, progress.steps_left, begin)


def notes_on_data(config: Config, data: Mapping[str, Images]) -> list[str]:
    """Lines on what a run can do with its files, and is seldom meant to.

    Args:
        config: of the run.
        data: what `data.train` and `data.val` are.
    """
    notes = []
    train, val = data["data.train"], data["data.val"]
    classes = train.classes
    if classes < config.model.num_classes:
        notes.append(
            f"model.num_classes {config.model.num_classes}: {config.data.train} has {classes} classes, so that "
            f"{config.model.num_classes - classes} outputs are never a label"
        )
    trained, evaluated = ({part.fingerprint for part in images.parts} for images in (train, val))
    same = train.path.resolve() == val.path.resolve() or trained == evaluated  # of a bare file nothing else is known
    if same or trained & evaluated:
        which = "the images" if same else "images"
        notes.append(
            f"data.val {config.data.val} holds {which} of data.train: accuracy will be that on what is trained"
        )
    return notes


def _frozen(config: Config, components: Components) -> str | None:
    """What is not trained now, in a line; None: all is."""
    shape, frozen = components.opt.sharding.full_shape, {True: 0, False: 0}
    for p in components.network.parameters():
        frozen[not p.requires_grad] += shape(p).numel()
    if not frozen[True]:
        return None
    now = components.progress.epoch
    ends = sorted({f.until_epoch for f in config.model.freeze if f.until_epoch is not None and f.holds(now)})
    until = f" before epoch {ends[0] + 1}" if ends else ""
    return f"model.freeze: {frozen[True]:,} of {sum(frozen.values()):,} weights are not trained{until}"


def _announce(
    config: Config,
    world: World,
    components: Components,
    bar: ProgressBar,
    resumed: Path | None,
    found: Preflight,
) -> None:
    bar.say(
        f"{components.progress.length} of {config.data.batch_size} images, "
        f"{components.split}{', found to fit' if config.train.max_micro_batch == 'auto' else ''}"
    )
    if (line := _frozen(config, components)) is not None:
        bar.say(line)
    if components.pretrained is not None:
        bar.say(f"model.pretrained: {components.pretrained}")
        if (note := components.pretrained.note(config.data.mean, config.data.std)) is not None:
            bar.say(f"note: {note}")
    if config.data.workers == "auto":
        bar.say(f"data.workers auto: {components.train.workers}")
    if (grows := config.data.progressive) is not None:
        bar.say(
            f"crops of {grows.resolution} px until epoch {grows.from_epoch + 1}, which grow to "
            f"{config.data.resolution} by epoch {grows.to_epoch + 1}"
        )
    fewest = fewest_samples(config, components.progress.length, components.train.images * world.size)
    if fewest is not None:
        bar.say(
            f"perturbation.mask.samples: a refresh near the end of an epoch scores what is left of it, {fewest} "
            "images at the least (metric mask/samples)"
        )
    for note in notes_on_data(config, found.data):
        bar.say(note)
    if resumed is not None:
        progress = components.progress
        within = f", {progress.seen:,} images of the next, step {progress.step}" if progress.seen else ""
        bar.say(f"resumed from {resumed} after epoch {progress.epoch}{within}")

"""When a run is saved: at the end of epochs, now and then within one, and when a signal asks it to end."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from safetensors import SafetensorError

from ssam_scale.config.schema import Config
from ssam_scale.errors import NotFiniteError, UserError
from ssam_scale.folders import existing
from ssam_scale.models import unfreezes
from ssam_scale.perturbation import StepReport
from ssam_scale.sharding import World
from ssam_scale.tracking.shutdown import Terminated, Unwinding
from ssam_scale.train.agreement import Agreement, Asked
from ssam_scale.train.hooks import Hook
from ssam_scale.train.progress import Progress

from .files import Snapshot, begin, discard, finish, not_finite, write, write_tensors
from .folder import Place, drop_old, newest
from .state import snapshot_of
from .together import Together, Written
from .writer import BackgroundWriter

if TYPE_CHECKING:
    from ssam_scale.train.build import Components
    from ssam_scale.train.evaluation import Evaluate, Evaluation
    from ssam_scale.train.progress import ProgressBar


class SaveCheckpoint(Hook):
    """Saves a run, and ends it once it is saved where a signal has asked for that.

    A checkpoint is copied between two steps and written beside the following ones. It is due after every
    `checkpoint.every_epochs` epochs and at the run's end; after every `every_steps` steps; and so early that no more
    than `every_minutes` are lost. The time is the first process's; a signal may come to any. What one of them asks for
    is known to all at the end of the next step (`Agreement`), so that all save at the same one. A failure to write is
    known in the same way.

    Args:
        config: of the run.
        world: the processes.
        components: whose state is saved.
        signals: whether one has asked this process to end.
        evaluate: knows the last evaluation.
        bar: tells what was saved when a signal ends the run.
        agreement: what processes ask for.
        clock: seconds, from anywhere.
    """

    doing = "saving"

    def __init__(
        self,
        config: Config,
        world: World,
        components: Components,
        signals: Unwinding,
        evaluate: Evaluate,
        bar: ProgressBar,
        agreement: Agreement,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config, self._world, self._components = config, world, components
        self._signals, self._evaluate, self._bar, self._clock = signals, evaluate, bar, clock
        self._agreement, self._writer = agreement, BackgroundWriter()
        self._saved = Place.of(components.progress)  # what a resumed run goes on from
        self._saved_step = components.progress.step
        self._begun = clock()

    def after_step(self, progress: Progress, report: StepReport) -> None:
        """Saves if it is due. Collective.

        Raises:
            Terminated: a signal has come to some process, and the run is saved.
            UserError: it could not be saved, now or in the background.
        """
        asked, every = self._agreement(self._asks()), self._config.checkpoint.every_steps
        if asked.fail:
            _raise_on_all(self._world, self._writer.wait())
        elif asked.end:
            self._save_and_end(progress)
        elif (every is not None and progress.step % every == 0) or (
            asked.save and progress.step > self._saved_step + 1  # it was asked for before the last one
        ):
            self._save(progress)

    def between_epochs(self, progress: Progress) -> None:
        """Saves if it is due. Collective.

        Raises:
            Terminated: a signal has come to some process, and the run is saved and not complete.
            UserError: it could not be saved.
        """
        last, every = progress.ended, self._config.checkpoint.every_epochs
        asked = self._agreement.now(self._asks())
        if asked.end and (progress.unevaluated or not last):
            self._save_and_end(progress)
        elif not last and unfreezes(self._config.model.freeze, progress.epoch):
            self._save(progress)  # what the run goes on from, with more that is trained
            _raise_on_all(self._world, self._writer.wait())
        elif last or progress.epoch % every == 0:
            self._save(progress)

    def on_end(self, error: BaseException | None) -> None:
        """Waits for what is being written. Collective if training is complete.

        Raises:
            UserError: it could not be written.
        """
        failure = self._writer.wait()
        if error is None:
            self._agreement.close()
            _raise_on_all(self._world, failure)

    def _asks(self) -> Asked:
        """What this process asks for."""
        return Asked(self._due(), self._signals.received is not None, bool(self._writer.failure()))

    def _due(self) -> bool:
        """Whether the time asks for a checkpoint, which is the first process's to say."""
        minutes = self._config.checkpoint.every_minutes
        if minutes is None or not self._world.first:
            return False
        # It is to be written by then; but half of the time is training's.
        return self._clock() - self._begun >= max(60.0 * minutes - self._writer.seconds, 30.0 * minutes)

    def _save(self, progress: Progress) -> None:
        self._saved, self._saved_step = Place.of(progress), progress.step
        self._begun = self._clock()
        _raise_on_all(self._world, self._writer.wait())  # there is no memory for two copies
        write = _copied(self._config, self._world, self._components, self._evaluate.of(progress))
        if write is not None:
            self._writer.start(write)

    def _save_and_end(self, progress: Progress) -> NoReturn:
        self._signals.take_your_time()
        if self._saved != Place.of(progress):
            self._save(progress)
        _raise_on_all(self._world, self._writer.wait())
        numbers = self._world.each_says(self._signals.received)
        number = next(number for number in numbers if number is not None)
        path = self._config.checkpoint.directory / str(self._saved)
        self._bar.say(f"{signal.Signals(number).name}: saved as {path}; --resume auto goes on from it")
        raise Terminated(number, saved=path.name)


def save(config: Config, world: World, components: Components, evaluation: Evaluation | None = None) -> None:
    """Write one checkpoint and delete those that are not to be kept. Collective.

    Raises:
        UserError: the folder cannot be written; what was there is untouched and nothing half-written remains.
    """
    write = _copied(config, world, components, evaluation)
    _raise_on_all(world, "" if write is None else write())


def _copied(
    config: Config, world: World, components: Components, evaluation: Evaluation | None
) -> Callable[[], str] | None:
    """Copy what this process saves; what writes it, and returns the message of a failure, or none. Collective."""
    snapshot = snapshot_of(config, world, components, evaluation)
    place = Place.of(components.progress)
    if snapshot is None:
        return None
    if snapshot.runs is None:
        return partial(_written, config, place, snapshot)
    # The folder is there before any process writes to it.
    failure = _tried(config, place, snapshot, begin) if world.first else ""
    together = Together(world, world.first_says(Together.attempt()))
    return partial(_written_together, config, world, place, snapshot, together, failure)


def _written(config: Config, place: Place, snapshot: Snapshot) -> str:
    """Write a checkpoint and delete what is not to be kept; the message of a failure, empty if there was none."""
    if failure := _objection(config, place, snapshot):
        return failure
    if not (failure := _tried(config, place, snapshot, partial(write, snapshot))):
        drop_old(config.checkpoint)
    return failure


def _written_together(
    config: Config, world: World, place: Place, snapshot: Snapshot, together: Together, failure: str
) -> str:
    """Write this process's part of a checkpoint; on the first process complete it. Otherwise as `_written`."""
    described: dict[str, Any] = {}

    def write_own(final: Path) -> None:
        described.update(write_tensors(snapshot, final))

    failure = failure or _objection(config, place, snapshot) or _tried(config, place, snapshot, write_own)
    together.tell(Written(described, failure, isinstance(failure, _NotFinite)))
    if not world.first:
        return failure
    every = together.hear()
    if failed := next((written for written in every if written.failure), None):
        discard(config.checkpoint.directory / str(place))
        return _NotFinite(failed.failure) if failed.not_finite else failed.failure
    files = {name: said for written in every for name, said in written.files.items()}
    if not (failure := _tried(config, place, snapshot, partial(finish, snapshot, files))):
        drop_old(config.checkpoint)
    return failure


def _objection(config: Config, place: Place, snapshot: Snapshot) -> str:
    """Why a snapshot is not to be saved; empty if it is."""
    if (name := not_finite(snapshot)) is None:
        return ""
    before = newest(config.checkpoint.directory)
    return _NotFinite(
        f"{name} is not finite after {place}, which is not saved; {f'{before} is sound, ' if before else ''}"
        "a lower optimizer.lr or perturbation.rho may help"
    )


def _tried(config: Config, place: Place, snapshot: Snapshot, write: Callable[[Path], object]) -> str:
    """Write to a checkpoint's place; why that failed, empty if it did not."""
    final = config.checkpoint.directory / str(place)
    try:
        write(final)
    except (OSError, SafetensorError) as error:
        free = shutil.disk_usage(existing(final.parent)).free
        return (
            f"checkpoint.directory: {final} was not written: {error} "
            f"(needs {snapshot.bytes / 2**20:.0f} MiB, {free / 2**20:.0f} MiB are free)"
        )
    return ""


class _NotFinite(str):
    """The message of a failure that is not the disk's: a weight is not finite."""

    __slots__ = ()


def _raise_on_all(world: World, failure: str) -> None:
    """Collective.

    Raises:
        NotFiniteError: some process has found a weight that is not finite.
        UserError: some process has the message of another failure.
    """
    own = torch.tensor([bool(failure), isinstance(failure, _NotFinite)], dtype=torch.int32, device=world.device)
    failed, not_finite = world.sum(own).tolist()
    if failed:
        error = NotFiniteError if not_finite else UserError
        raise error(failure or "another process could not write the checkpoint; its message says why")

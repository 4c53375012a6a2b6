"""What records a run: `Tracker`, each of which is one file in `trackers/` that registers it, and a name in the schema.

A run without trackers (`tracking: null`) has none of this. What is recorded, and when, is `run.Run`'s; where it goes,
and what becomes of it when that place fails, is a tracker's.
"""

from __future__ import annotations

import logging
import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ssam_scale.config.schema import Config
from ssam_scale.errors import UserError
from ssam_scale.registry import Registry
from ssam_scale.tracking.store import one_line

if TYPE_CHECKING:
    from torch import nn

    from ssam_scale.data.images import Images

_log = logging.getLogger(__name__)

DESCRIPTION = "mlflow.note.content"
"""The tag that is a run's story, in Markdown; by MLflow's name for it, which shows it."""

SUMMARY = "summary/"
"""Of the names of metrics that stand for a whole run, which are recorded at step 0."""

# How long the end of a run may take each. Launchers kill for good 30 s after they ask politely, and MLflow comes first.
_CLOSE_WITHIN_S = {"FINISHED": 60.0, "FAILED": 6.0, "KILLED": 3.0}


@dataclass(frozen=True)
class Start:
    """What is known of a run when it begins, or goes on.

    Attributes:
        name: for people.
        params: the resolved configuration by dotted key, and what was left to the machine; without secrets.
        tags: where and how it runs; without secrets. Those that begin with `mlflow.` are for MLflow alone.
        step: optimizer steps done; 0: it is new.
        resume_run_id: `Tracker.run_id` of before, if a tracker had one.
    """

    name: str
    params: Mapping[str, str]
    tags: Mapping[str, str]
    step: int = 0
    resume_run_id: str | None = None

    @property
    def own_tags(self) -> dict[str, str]:
        """The tags but those for MLflow alone."""
        return {key: value for key, value in self.tags.items() if not key.startswith("mlflow.")}


@dataclass(frozen=True)
class Earlier:
    """What a tracker knows of a run that goes on.

    Attributes:
        best_top1: percent; None: nothing was evaluated.
        saved_seconds: that were saved over dense SAM.
        layers: the table of layer densities; None: there is none.
    """

    best_top1: float | None = None
    saved_seconds: float = 0.0
    layers: str | None = None


class Tracker(ABC):
    """Where a run is recorded, on the one process that tracks. Every method but `open` and `close` returns at once.

    Nothing but `check` and `open` raises: what goes wrong later is a warning, and the run trains on.

    Args:
        config: of the run.
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    @classmethod
    @abstractmethod
    def check(cls, config: Config) -> str:
        """Where a run of this configuration would be recorded, in words, before there is something to record.

        Raises:
            UserError: it cannot be; says what would work.
        """

    @abstractmethod
    def open(self, start: Start) -> Earlier:
        """Begin to record, or go on.

        Raises:
            UserError: it cannot be recorded.
        """

    @abstractmethod
    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record metrics at an optimizer step; `SUMMARY` ones at step 0."""

    @abstractmethod
    def tag(self, key: str, value: str) -> None:
        """Set a tag of the run."""

    @abstractmethod
    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Keep a copy of a file with the run, in `folder` of it, if this tracker keeps such files."""

    @abstractmethod
    def close(self, status: str, failure: str) -> None:
        """End the record within moments.

        Args:
            status: FINISHED, FAILED or KILLED.
            failure: why, in a line; empty if it has finished.
        """

    @property
    def run_id(self) -> str | None:
        """By which checkpoints and `result.json` name the run; None where it has no such name here."""
        return None

    def stuck(self, signal_name: str) -> None:  # noqa: B027 - most have nothing to do
        """A signal has come and the main thread does not react. Called from another thread."""

    def data(self, images: Images, context: str, side: int) -> None:  # noqa: B027
        """Record what the run reads, if this tracker keeps that: see `Run.log_data`."""

    def network(  # noqa: B027
        self, network: Callable[[], nn.Module], *, side: int, classes: int, step: int
    ) -> None:
        """Keep what was trained, if this tracker keeps models: see `Run.log_network`."""

    def watching_machine(self, node: str | None) -> AbstractContextManager[object]:
        """Within the `with`, what this machine does is recorded, if this tracker records that."""
        return nullcontext()

    def interface_lines(self) -> list[str]:
        """What to type and where to look to see the run."""
        return []


TRACKERS: Registry[type[Tracker]] = Registry("ssam_scale.tracking.trackers")
"""By the names that `tracking.trackers` takes."""


class QueuedTracker(Tracker):
    """A tracker whose place is written to by one thread of its own, in order, so that no step waits for it.

    Where writing fails, that is a warning, and nothing is recorded there any more until the run is resumed.

    Attributes:
        name: for people.
    """

    name: str

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write_all, name=self.name, daemon=True)
        self._failed = False

    @abstractmethod
    def begin(self, start: Start) -> None:
        """Open the place; what it raises ends the run, before it has begun."""

    @abstractmethod
    def write_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Write metrics at a step; see `Tracker.log`."""

    @abstractmethod
    def write_tag(self, key: str, value: str) -> None:
        """Write a tag; `DESCRIPTION` is one of them."""

    @abstractmethod
    def write_picture(self, name: str, png: bytes) -> None:
        """Write a picture, e.g. `mask/density`, which replaces the one before of the name."""

    @abstractmethod
    def end(self, status: str) -> None:
        """Close the place; also called after something has failed, and before anything was begun."""

    def open(self, start: Start) -> Earlier:
        """See `Tracker.open`."""
        try:
            self.begin(start)
        except UserError:
            raise
        except Exception as error:  # a library's, of every kind
            raise UserError(f"tracking.trackers: {self.name} cannot record: {one_line(error)}") from error
        self._thread.start()
        return Earlier()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """See `Tracker.log`."""
        kept = dict(metrics)
        self._queue.put(lambda: self.write_metrics(kept, step))

    def tag(self, key: str, value: str) -> None:
        """See `Tracker.tag`."""
        self._queue.put(lambda: self.write_tag(key, value))

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """See `Tracker.artifact`: pictures are kept."""
        if path.suffix != ".png":
            return
        try:
            png = path.read_bytes()
        except OSError as error:
            _log.warning("%s: picture %s is not recorded: %s", self.name, path, error)
            return
        self._queue.put(lambda: self.write_picture((Path(folder or "") / path.stem).as_posix(), png))

    def close(self, status: str, failure: str) -> None:
        """See `Tracker.close`."""
        if not self._thread.is_alive():  # it has failed to open, or there is nothing to close
            self._try(lambda: self.end(status))
            return
        for key, value in (("status", status), ("failure", failure)):
            if value:
                self.tag(key, value)
        self._queue.put(None)
        self._queue.put(lambda: self.end(status))
        self._thread.join(_CLOSE_WITHIN_S[status])
        if self._thread.is_alive():
            _log.warning("%s has not taken the end of the run in %g s", self.name, _CLOSE_WITHIN_S[status])

    def _write_all(self) -> None:
        while (write := self._queue.get()) is not None:
            if not self._failed:
                self._try(write)
        if (end := self._queue.get()) is not None:
            self._try(end)

    def _try(self, write: Callable[[], None]) -> None:
        try:
            write()
        except Exception as error:  # a library's, of every kind; no training depends on it
            if not self._failed:
                _log.warning("%s records no more of this run, which goes on: %s", self.name, one_line(error))
            self._failed = True


def check_installed(module: str, tracker: str) -> None:
    """Look for the package that a tracker is made of, without importing it.

    Args:
        module: that it is imported by.
        tracker: its name, which is the extra's that brings it.

    Raises:
        UserError: it is not installed.
    """
    if find_spec(module) is None:
        raise UserError(
            f"tracking.trackers: {tracker} needs the package {module}, which is not installed: "
            f"pip install 'ssam_scale[{tracker}]', or name other trackers"
        )

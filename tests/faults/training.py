"""A training that is started by a launcher, interrupted, and started again."""

from __future__ import annotations

import json
import os
import signal
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ssam_scale.cli.main import main
from ssam_scale.train.checkpoint import checkpoints
from tests.support.ranks import start_launcher

LIMIT_S = 1800.0
"""After which something hangs: hundreds of times of what it takes on a machine that does nothing else."""


class HangError(Exception):
    """Something did not end, or begin, within LIMIT_S."""


@dataclass(frozen=True)
class Training:
    """What is trained, and where.

    Attributes:
        processes: 1: without a launcher.
        config: the YAML file.
        overrides: beside it.
        home: the folder of its checkpoints and database.
        last: the name of the checkpoint that it ends with.
    """

    processes: int
    config: Path
    overrides: tuple[str, ...]
    home: Path
    last: str

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.home / "checkpoints"

    @property
    def database(self) -> Path:
        """The tracking store."""
        return self.home / "mlflow.db"

    @property
    def arguments(self) -> list[str]:
        """Of `ssam-scale`, but for resuming."""
        places = f"checkpoint.directory={self.checkpoints}", f"tracking.uri=sqlite:///{self.database}"
        return ["train", "--config", str(self.config), *self.overrides, *places]

    def is_complete(self) -> bool:
        """Whether nothing is left to train."""
        return (self.checkpoints / self.last).exists()


class Running:
    """One start of a training, with `--resume auto`; to be entered with `with`, which leaves no process behind.

    Attributes:
        training: what runs.
    """

    def __init__(self, training: Training, number: int) -> None:
        self.training = training
        # Not at home, where a fault may fill the disk: what ranks say and end with is known all the same.
        self._own = tempfile.TemporaryDirectory(prefix=f"start-{number:03d}-")
        self._folder = Path(self._own.name)
        self._before = names(training.checkpoints)

    def __enter__(self) -> Running:
        arguments = [*self.training.arguments, "--resume", "auto"]
        self._launcher = start_launcher(self.training.processes, self._folder, main, arguments)
        wait_for(lambda: (self._folder / "pids").exists(), "the ranks have not started")
        self.ranks: list[int] = json.loads((self._folder / "pids").read_text())
        return self

    def __exit__(self, *error: object) -> None:
        for rank in self.ranks:
            send(rank, signal.SIGKILL)
        self._launcher.kill()
        self._launcher.join()
        self._own.cleanup()

    @property
    def launcher(self) -> int:
        """Its process."""
        return int(self._launcher.pid)

    @property
    def said(self) -> str:
        """By all ranks."""
        return "".join(log.read_text(errors="replace") for log in sorted(self._folder.glob("*.log")))

    @property
    def codes(self) -> list[int]:
        """Exit codes of the ranks that have ended while their launcher lived, by rank."""
        file = self._folder / "codes"
        return [code for _, code in sorted(json.loads(file.read_text()).items())] if file.exists() else []

    def wait_for_checkpoints(self, count: int) -> None:
        """Until so many are there that were not there when it started, or it has ended."""
        seen: set[str] = set()

        def enough() -> bool:
            seen.update(names(self.training.checkpoints) - self._before)
            return len(seen) >= count or self.has_ended()

        wait_for(enough, f"no {count} checkpoints were written")

    def has_ended(self) -> bool:
        """Whether no rank is left."""
        return not any(map(is_alive, self.ranks))

    def wait_for_end(self) -> None:
        """Until no rank is left, nor the launcher."""
        wait_for(lambda: self.has_ended() and not self._launcher.is_alive(), "the run has not ended")


def names(folder: Path) -> set[str]:
    """Of the checkpoints in a folder."""
    return {path.name for path in checkpoints(folder)}


def send(pid: int, number: signal.Signals) -> None:
    """A signal to a process that may have ended."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and whose parent has not asked for its code does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(condition: Callable[[], bool], what: str, pause: float = 0.005) -> None:
    """Poll until a condition holds.

    Raises:
        HangError: it does not within LIMIT_S.
    """
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        if time.monotonic() > deadline:
            raise HangError(f"{what} within {LIMIT_S:.0f} s")
        time.sleep(pause)

"""The kinds of faults: what happens to a training that runs, and what happens to a checkpoint that lies there."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

from ssam_scale.tracking.shutdown import SAVED
from ssam_scale.train.checkpoint import checkpoints
from tests.support.damage import flipped

from .training import Running, send, wait_for

MISUSE = 2


@dataclass(frozen=True)
class Fault:
    """Something that happens to a training.

    Attributes:
        name: in a line.
        strike: does it to a training, and returns when that has ended.
        code: that all ranks end with; None: whatever it is, but 0.
        says: what one of them says.
        shared: whether it takes several processes.
        early: whether it comes before anything is saved.
        loses_records: whether metrics may be lost, because neither the store nor the disk takes them.
    """

    name: str
    strike: Callable[[Running, random.Random], None]
    code: int | None = None
    says: str = ""
    shared: bool = False
    early: bool = False
    loses_records: bool = False


def _kill_one(run: Running, draw: random.Random) -> None:
    send(draw.choice(run.ranks), signal.SIGKILL)
    run.wait_for_end()


def _kill_all(run: Running, draw: random.Random) -> None:
    for pid in (run.launcher, *run.ranks):
        send(pid, signal.SIGKILL)
    run.wait_for_end()


def _kill_early(run: Running, draw: random.Random) -> None:
    time.sleep(draw.uniform(0.0, 3.0))
    _kill_all(run, draw)


def _kill_launcher(run: Running, draw: random.Random) -> None:
    send(run.launcher, signal.SIGKILL)
    run.wait_for_end()


def _kill_while_writing(run: Running, draw: random.Random) -> None:
    folder, what = run.training.checkpoints, draw.choice((".epoch_*.partial", ".epoch_*.deleted"))
    wait_for(lambda: run.has_ended() or any(folder.glob(what)), f"no {what} was seen", pause=0.0)
    for _ in range(draw.randrange(200)):  # somewhere within
        any(folder.glob(what))
    _kill_all(run, draw)


def _terminate_one(run: Running, draw: random.Random) -> None:
    send(draw.choice(run.ranks), signal.SIGTERM)
    run.wait_for_end()


def _terminate_all(run: Running, draw: random.Random) -> None:
    send(run.launcher, signal.SIGTERM)
    run.wait_for_end()


def _usr1_to_all(run: Running, draw: random.Random) -> None:
    for pid in run.ranks:
        send(pid, signal.SIGUSR1)
    run.wait_for_end()


def _stopped_for_a_while(run: Running, draw: random.Random) -> int:
    """A rank, which is still stopped."""
    rank: int = draw.choice(run.ranks)
    send(rank, signal.SIGSTOP)
    time.sleep(draw.uniform(0.2, 2.0))
    return rank


def _stop_and_kill(run: Running, draw: random.Random) -> None:
    rank = _stopped_for_a_while(run, draw)
    send(rank, signal.SIGKILL)
    run.wait_for_end()


def _stop_and_terminate(run: Running, draw: random.Random) -> None:
    """A rank that was stopped for a while is not one that is lost."""
    rank = _stopped_for_a_while(run, draw)
    send(rank, signal.SIGCONT)
    _terminate_all(run, draw)


def _full_disk(run: Running, draw: random.Random) -> None:
    filler = run.training.home / "filler"
    try:
        with filler.open("wb", buffering=0) as file:
            with suppress(OSError):
                while file.write(bytes(1 << 20)):
                    pass
            file.truncate(max(0, file.tell() - draw.randrange(1 << 16)))  # some room is left
        run.wait_for_end()
    finally:
        filler.unlink()


def _store_away(run: Running, draw: random.Random) -> None:
    """Somebody else holds the database for longer than anybody waits."""
    with closing(sqlite3.connect(run.training.database, timeout=60, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        run.wait_for_checkpoints(draw.randint(2, 4))
        _terminate_all(run, draw)
        other.execute("ROLLBACK")


LIVE = (
    Fault("SIGKILL of one rank", _kill_one, shared=True),
    Fault("SIGKILL of all processes", _kill_all),
    Fault("SIGKILL of all before the first step", _kill_early, early=True),
    Fault("SIGKILL of all while a checkpoint is written or deleted", _kill_while_writing),
    Fault("SIGKILL of the launcher", _kill_launcher, says="the launcher .* has ended", shared=True),
    Fault("SIGTERM to one rank", _terminate_one, code=SAVED, says="SIGTERM: saved as"),
    Fault("SIGTERM to the launcher, which passes it on", _terminate_all, code=SAVED, says="SIGTERM: saved as"),
    Fault("SIGUSR1 to all ranks", _usr1_to_all, code=SAVED, says="SIGUSR1: saved as"),
    Fault("SIGSTOP of one rank, then SIGKILL", _stop_and_kill),
    Fault("SIGSTOP of one rank, SIGCONT, then SIGTERM", _stop_and_terminate, code=SAVED, says="SIGTERM: saved as"),
    Fault("full disk", _full_disk, code=MISUSE, says="was not written: ", loses_records=True),
    Fault("tracking store away, then SIGTERM", _store_away, code=SAVED, says="ssam-scale send"),
)


def _flip(folder: Path, draw: random.Random) -> None:
    file = draw.choice(sorted(folder.iterdir()))
    raw = file.read_bytes()
    file.write_bytes(flipped(raw, draw.randrange(8 * len(raw))))


def _truncate(folder: Path, draw: random.Random) -> None:
    file = draw.choice(sorted(folder.iterdir()))
    os.truncate(file, draw.randrange(file.stat().st_size))


def _unlink(folder: Path, draw: random.Random) -> None:
    draw.choice(sorted(folder.iterdir())).unlink()


def _hole(folder: Path, draw: random.Random) -> None:
    """As file systems leave it whose journal has a file's length and not its blocks."""
    file = folder / "state.json"
    raw = bytearray(file.read_bytes())
    begin = draw.randrange(len(raw))
    end = min(len(raw), begin + draw.randint(1, 4096))
    raw[begin:end] = bytes(end - begin)
    file.write_bytes(raw)


def _exchange(folder: Path, draw: random.Random) -> None:
    """A file of an earlier checkpoint, which is whole in itself, and another: no step may lie between the last two."""
    for earlier in reversed(checkpoints(folder.parent)[:-1]):
        pairs = [(file, (earlier / file.name).read_bytes()) for file in sorted(folder.glob("model.*"))]
        if others := [(file, content) for file, content in pairs if content != file.read_bytes()]:
            file, content = draw.choice(others)
            file.write_bytes(content)
            return
    raise ValueError(f"all checkpoints in {folder.parent} have the same weights")


AT_REST: dict[str, Callable[[Path, random.Random], None]] = {
    "a bit of the newest checkpoint flipped": _flip,
    "a file of the newest checkpoint cut short": _truncate,
    "a file of the newest checkpoint deleted": _unlink,
    "zeros in the newest state.json": _hole,
    "weights of an older checkpoint in the newest": _exchange,
}

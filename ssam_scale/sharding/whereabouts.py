"""Where each process is, kept in the process group's store, so that the one that others wait for has a name.

A process notes each phase that it enters in its own memory: one assignment. A thread of its own publishes that every
second, with a count that says that it lives, over a connection of its own; it also looks after the processes beside it
on the same machine, because how one was killed is known there only, and only for a moment. Nobody reads it before a
collective fails. The store and no files beside the checkpoints, because it is there before a folder is known, and a
network's files would be seen late; where it is away, its own host is what hangs.
"""

from __future__ import annotations

import json
import os
import re
import select
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ssam_scale.ended import status_of_dead, status_words
from ssam_scale.errors import RankLostError, UserError
from ssam_scale.torch_compat import flight_record

BEAT_S = 1.0
"""Between two signs of life."""

# After which a process that gave no sign of life is silent: a thread that waits for its turn may be late.
_SILENT_AFTER_S = 4.0 * BEAT_S
# For the store to answer; it has its own threads, which do nothing else.
_ANSWER_WITHIN_S = 5.0

_KEY = "ssam_scale/whereabouts"
_VERDICT = f"{_KEY}/verdict"

_WORDS = {
    "data": "data loading",
    "reference": "outputs of earlier weights",
    "ascent forward": "the ascent's forward",
    "ascent backward": "the ascent's backward",
    "perturb": "perturbing the weights",
    "descent forward": "the descent's forward",
    "descent backward": "the descent's backward",
    "optimizer": "the base optimizer",
}
_DATA = "data"


@dataclass(frozen=True)
class Sighting:
    """What a process has said of itself.

    Attributes:
        host: its machine.
        pid: its id there.
        step: of training, counted from 1; 0: before the first.
        order: how many phases of the step it has entered; the same on all processes, which do the same.
        phase: the last of them.
        since: when it entered that, in seconds since 1970 by its own clock.
        beat: how often it has said something.
        waits: it has waited for others for too long.
        ended: why it has left; empty: it has not.
    """

    host: str
    pid: int
    step: int = 0
    order: int = 0
    phase: str = "starting"
    since: float = 0.0
    beat: int = 0
    waits: bool = False
    ended: str = ""

    @property
    def place(self) -> tuple[int, int]:
        """How far it has come."""
        return self.step, self.order

    def doing(self) -> str:
        """Its phase in words."""
        return _WORDS.get(self.phase, self.phase)


def verdict_of(
    before: Mapping[int, Sighting], after: Mapping[int, Sighting], gone: Mapping[int, str], size: int
) -> str:
    """Who is to blame that others wait, in one line: the ones that are gone, else those that are furthest behind.

    Args:
        before: by rank, what was known some beats ago.
        after: the same now.
        gone: how processes have ended, by rank, as those beside them saw it.
        size: number of processes.
    """
    # Who leaves because it has lost another, is none that was lost first.
    killed = {rank: how for rank, how in gone.items() if "killed" in how} or {
        rank: how for rank, how in gone.items() if not (rank in after and after[rank].waits)
    }
    if killed:
        return "; ".join(_gone(rank, after.get(rank), how) for rank, how in sorted(killed.items()))
    if ended := {rank: seen for rank, seen in after.items() if seen.ended and not seen.waits}:
        return "; ".join(f"{_name(rank, seen)} has ended: {seen.ended}" for rank, seen in sorted(ended.items()))
    if missing := [rank for rank in range(size) if rank not in after]:
        return f"{_ranks(missing)} never said anything: not started, or without a way to the store"
    there = [rank for rank, seen in after.items() if seen.waits]
    late = [rank for rank in after if rank not in there]
    if not late:
        late, there = sorted(after), []
    furthest = max((seen for seen in after.values()), key=lambda seen: seen.place)
    behind = min(after[rank].place for rank in late)
    silent = [rank for rank in late if rank in before and before[rank].beat == after[rank].beat]
    if all(after[rank].place == furthest.place for rank in after) and not there and not silent:
        return (
            f"all processes wait for each other, in {_doing(furthest)}: they came too far apart, or to collectives "
            "that do not belong together"
        )
    blamed = silent or [rank for rank in late if after[rank].place == behind]
    return "; ".join(_late(rank, after[rank], furthest, silent=rank in silent) for rank in sorted(blamed))


def _name(rank: int, seen: Sighting | None) -> str:
    return f"rank {rank}" if seen is None else f"rank {rank} (node {seen.host})"


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s'[: len(ranks) > 1]} {', '.join(map(str, ranks))}"


def _gone(rank: int, seen: Sighting | None, how: str) -> str:
    return f"{_name(rank, seen)} {how}" + ("" if seen is None else f", in {_doing(seen)}")


def _doing(seen: Sighting) -> str:
    if not seen.step:
        return seen.doing()
    return f"{seen.doing()} {'of' if seen.phase in _WORDS else 'at'} step {seen.step}"


def _late(rank: int, seen: Sighting, furthest: Sighting, *, silent: bool) -> str:
    if seen.place == furthest.place:
        awaited = f"the end of {_doing(seen)}"
    elif seen.step < furthest.step or seen.phase == _DATA:
        awaited = f"step {furthest.step}"
    else:
        awaited = _doing(furthest)
    doing = seen.doing() if seen.step == furthest.step else _doing(seen)
    said = f"{_name(rank, seen)} has not come to {awaited}: it is in {doing} since {_clock(seen.since)}"
    if silent:
        said += ", and has given no sign of life since: it is stopped, or its machine or network is away"
    return said


def _clock(seconds: float) -> str:
    """Hours and minutes, with the date where it is not of today."""
    then, now = time.localtime(seconds), time.localtime()
    return time.strftime("%H:%M:%S" if then[:3] == now[:3] else "%Y-%m-%d %H:%M:%S", then)


class Whereabouts:
    """Where this process is, which the others can ask for; alone it only remembers.

    Args:
        rank: of this process.
        size: number of processes.
        store: the process group's; None: this process is alone.
        notice_after: seconds in one phase after which a line says who is late, for a backend that raises nothing when
            a collective has waited too long; None: an exception will say it.
    """

    def __init__(self, rank: int = 0, size: int = 1, store: Any = None, notice_after: float | None = None) -> None:
        self._rank, self._size, self._store, self._notice_after = rank, size, store, notice_after
        self._noticed = 0.0
        self._own = Sighting(socket.gethostname(), os.getpid(), since=time.time())
        self._place = (0, 0, "starting", time.time())
        self._first: Sighting | None = None  # of rank 0, which may hold the store
        self._verdict = ""
        self._watched: dict[int, int] = {}  # rank by pidfd
        self._ended = False
        self._said = threading.Lock()
        self._wake = os.eventfd(0) if store is not None else -1
        self._thread: threading.Thread | None = None
        if store is not None:
            self._thread = threading.Thread(target=self._publish, name="whereabouts", daemon=True)
            self._thread.start()

    def begin_step(self, step: int) -> None:
        """This process begins a step, counted from 1."""
        self._place = (step, 0, "between two steps", time.time())

    def at(self, phase: str) -> None:
        """This process enters a phase. No more than an assignment."""
        step, order, *_ = self._place
        self._place = (step, order + 1, phase, time.time())

    def leave(self, why: str) -> None:
        """This process goes, after which nothing is published; waits for a moment until the others can know."""
        if self._thread is None:
            return
        with self._said:
            self._own, self._ended = replace(self._own, ended=why or "done"), True
        os.eventfd_write(self._wake, 1)
        self._thread.join(3.0 * BEAT_S)
        self._thread = None

    def verdict(self) -> str:
        """Who is to blame for a collective that failed here, in one line: the same on all that can reach the store."""
        with self._said:
            self._own = replace(self._own, waits=True)
        if self._wake >= 0:
            os.eventfd_write(self._wake, 1)
        found: list[str] = []

        def ask() -> None:
            with suppress(Exception):  # a store that is away raises what it likes
                found.append(self._asked())

        thread = threading.Thread(target=ask, name="who is late", daemon=True)
        thread.start()
        thread.join(_SILENT_AFTER_S + 2.0 * _ANSWER_WITHIN_S)
        if found:
            if self._rank == 0:
                time.sleep(2.0 * BEAT_S)  # the store may end with this process: the others shall have read it
            return found[0]
        return self._verdict or self._without_store()

    def _asked(self) -> str:
        store = _connected(self._store)
        before = self._read(store)
        deadline = time.monotonic() + _SILENT_AFTER_S
        while time.monotonic() < deadline and not store.check([_VERDICT]) and not self._read_gone(store):
            time.sleep(0.1)
        after, gone = self._read(store), self._read_gone(store)
        after[self._rank] = self._own  # which on a busy machine may not have been published yet
        said = store.compare_set(_VERDICT, "", verdict_of(before, after, gone, self._size))
        return bytes(said).decode()

    def _without_store(self) -> str:
        address = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            return f"torchrun's agent at {address}, which holds the store, does not answer: it is stopped or gone"
        said = f"{_name(0, self._first)}, which holds the store of the processes at {address}, does not answer: it is "
        said += "stopped or gone, or its machine or network is away"
        if self._first is not None:
            said += f"; it was in {_doing(self._first)} since {_clock(self._first.since)}"
        return said

    # The thread.

    def _publish(self) -> None:
        with suppress(Exception):  # without the store there is nobody to tell
            store = _connected(self._store)
            poller = select.poll()
            poller.register(self._wake, select.POLLIN)
            while True:
                with self._said:
                    step, order, phase, since = self._place
                    self._own = replace(
                        self._own, step=step, order=order, phase=phase, since=since, beat=self._own.beat + 1
                    )
                    said, last = self._own, self._ended
                store.set(f"{_KEY}/{self._rank}", json.dumps(asdict(said)))
                if last:
                    self._go(store)
                    return
                self._look_after_neighbours(store, poller)
                self._remember(store)
                self._notice()
                for fd, _ in poller.poll(1000.0 * BEAT_S):
                    if fd == self._wake:
                        os.eventfd_read(fd)
                    else:
                        poller.unregister(fd)
                        self._report(store, fd)

    def _go(self, store: Any) -> None:
        """Count as gone; the first, with which the store may end, waits a little for the others."""
        gone, deadline = store.add(f"{_KEY}/left", 1), time.monotonic() + 2.0 * BEAT_S
        while self._rank == 0 and gone < self._size and time.monotonic() < deadline:
            time.sleep(0.05)
            gone = store.add(f"{_KEY}/left", 0)

    def _notice(self) -> None:
        """Say who is late, once for each phase that takes too long."""
        since = self._own.since
        if self._notice_after is None or since == self._noticed or time.time() - since < self._notice_after:
            return
        self._noticed = since

        def say() -> None:
            with suppress(Exception):
                store = _connected(self._store)
                before = self._read(store)
                time.sleep(_SILENT_AFTER_S)
                after = self._read(store)
                after[self._rank] = replace(after[self._rank], waits=True)
                line = verdict_of(before, after, self._read_gone(store), self._size)
                print(f"ssam-scale: rank {self._rank} waits: {line}", file=sys.stderr, flush=True)

        threading.Thread(target=say, name="who is late", daemon=True).start()

    def _remember(self, store: Any) -> None:
        """What is to be known when the store is away."""
        if store.check([_VERDICT]):
            self._verdict = bytes(store.get(_VERDICT)).decode()
        if self._rank and store.check([f"{_KEY}/0"]):
            self._first = Sighting(**json.loads(store.get(f"{_KEY}/0")))

    def _look_after_neighbours(self, store: Any, poller: select.poll) -> None:
        """Watch the processes on this machine that are not watched yet, as torchrun and deepspeed number them."""
        here = int(os.environ.get("LOCAL_RANK", "0"))
        count = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1")
        neighbours = range(self._rank - here, min(self._rank - here + count, self._size))
        for rank in neighbours:
            if rank == self._rank or rank in self._watched or not store.check([f"{_KEY}/{rank}"]):
                continue
            seen = Sighting(**json.loads(store.get(f"{_KEY}/{rank}")))
            if seen.host == self._own.host:
                with suppress(OSError, AttributeError):  # gone already; no Linux
                    self._watched[rank] = os.pidfd_open(seen.pid)
                    poller.register(self._watched[rank], select.POLLIN)

    def _report(self, store: Any, pidfd: int) -> None:
        """Say how a process on this machine has ended, unless it has said so itself."""
        rank = next(rank for rank, fd in self._watched.items() if fd == pidfd)
        seen = Sighting(**json.loads(store.get(f"{_KEY}/{rank}")))
        status = status_of_dead(seen.pid)
        if not seen.ended:
            how = "has ended without a word" if status is None else status_words(status)
            store.set(f"{_KEY}/gone/{rank}", how)

    def _read(self, store: Any) -> dict[int, Sighting]:
        keys = {rank: f"{_KEY}/{rank}" for rank in range(self._size)}
        return {rank: Sighting(**json.loads(store.get(key))) for rank, key in keys.items() if store.check([key])}

    def _read_gone(self, store: Any) -> dict[int, str]:
        keys = {rank: f"{_KEY}/gone/{rank}" for rank in range(self._size)}
        return {rank: bytes(store.get(key)).decode() for rank, key in keys.items() if store.check([key])}


def _connected(store: Any) -> Any:
    """A connection of one's own: one that is shared waits for what another thread waits for."""
    own = store.clone()
    own.set_timeout(timedelta(seconds=_ANSWER_WITHIN_S))
    return own


# What gloo, NCCL and the store say when another process is gone or late; of no types of their own.
_LOST = re.compile(
    r"gloo|NCCL|ProcessGroup|Connection (closed|reset|refused)|Broken pipe|[Tt]imed? ?out|failed to recv"
)


def is_lost(error: BaseException) -> bool:
    """Whether an exception says that another process did not take part in a collective.

    Or came of one that says so: what a library then leaves unfinished, as ZeRO's gathering, may be an error of its own.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, dist.DistError) or (isinstance(seen, RuntimeError) and _LOST.search(str(seen))):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


@contextmanager
def naming_the_lost(whereabouts: Whereabouts, size: int, records: Path | None = None) -> Iterator[None]:
    """Within the `with`, a collective that fails because of another process raises `RankLostError`, which names it.

    Args:
        whereabouts: of the processes.
        size: how many they are.
        records: the folder that gets PyTorch's flight recorder, which knows the last collectives.

    Raises:
        RankLostError: another process is gone, or has not come within the time limit.
    """
    try:
        yield
    except (RankLostError, UserError):
        raise
    except Exception as error:
        if size == 1 or not is_lost(error):
            raise
        said = whereabouts.verdict()
        raise RankLostError(said + _recorded(records)) from error


def _recorded(folder: Path | None) -> str:
    """Where the flight recorder's last collectives of this process are kept, in words; empty if there are none."""
    record = flight_record()
    if folder is None or record is None:
        return ""
    path = folder / f"rank_{os.environ.get('RANK', '0')}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_bytes(record)
    except OSError:
        return ""
    return f" (the last collectives: {path})"

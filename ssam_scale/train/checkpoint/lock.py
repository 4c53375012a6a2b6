"""One job at a time in a folder of checkpoints: a file that says who it is, on any file system.

Locks of the operating system (`flock`, `fcntl`) do not reach other hosts on every NFS. Here a file is made under a name
of its own and linked to the lock's, which succeeds for one of several hosts at once; where there are no links, it is
made by `O_EXCL`. Its time of change is renewed every BEAT_S, so that others see that its holder lives. Times are
compared with those of the same file system, or seen to change, and never with a host's clock.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from ssam_scale.config.schema import Config
from ssam_scale.console import console
from ssam_scale.errors import UserError
from ssam_scale.sharding import World

from .files import sweep

NAME = ".lock"
BEAT_S = 10.0
STALE_S = 120.0  # a holder on another host that has not renewed its lock for so long is gone


@dataclass(frozen=True)
class Holder:
    """Who holds a folder.

    Attributes:
        host: its name.
        pid: of the process, in its namespace.
        started: when the kernel started the process, in ticks since it booted itself.
        kernel: the kernel's and the namespace's identity: processes are told apart by `pid` and `started` within one.
        run: what is trained, in words.
        job: Slurm's number of the job; empty without one.
        start: how often Slurm has started that job again.
        token: of this lock alone.
    """

    host: str
    pid: int
    started: str
    kernel: str
    run: str
    job: str
    start: int
    token: str

    @classmethod
    def here(cls, run: str) -> Holder:
        """This process."""
        pid = os.getpid()
        job, start = os.environ.get("SLURM_JOB_ID", ""), int(os.environ.get("SLURM_RESTART_COUNT", "0") or 0)
        token = secrets.token_hex(8)
        return cls(socket.gethostname(), pid, _started(pid) or "", _kernel(), run, job, start, token)

    def is_gone(self, other: Holder) -> bool | None:
        """Whether `self` is known to be gone, asked by `other`; None: only its heartbeat can tell."""
        if self.job and (self.job, self.start) < (other.job, other.start) and self.job == other.job:
            return True  # the same job, which Slurm has ended before it started it again
        return _started(self.pid) != self.started if self.kernel and self.kernel == other.kernel else None

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} ({self.run}{f', job {self.job}' if self.job else ''})"


@contextmanager
def locked(config: Config, world: World) -> Iterator[None]:
    """The folder of checkpoints is this run's inside, and free of what interrupted writing has left. Collective.

    Raises:
        UserError: it cannot be written to, or another job has it; says who.
    """
    lock, problem = FolderLock(config.checkpoint.directory, f"{config.method} {config.model.name}"), ""
    try:
        if world.first:
            try:
                lock.acquire()
                sweep(config.checkpoint.directory)
            except UserError as error:
                problem = str(error)
            except OSError as error:
                problem = f"checkpoint.directory {config.checkpoint.directory}: {error.strerror or error}"
        if problem := world.first_says(problem):
            raise UserError(problem)
        yield
    finally:
        lock.release()


class FolderLock:
    """See `locked`.

    Args:
        directory: made if it is not there.
        run: what is trained, in words.
        beat: seconds between two renewals.
        stale: seconds without one after which a holder on another host is gone.
    """

    def __init__(self, directory: Path, run: str, beat: float = BEAT_S, stale: float = STALE_S) -> None:
        self._directory, self._path, self._beat, self._stale = directory, directory / NAME, beat, stale
        self._me = Holder.here(run)
        self._made: list[Path] = []
        self._held, self._ended = False, threading.Event()

    def acquire(self) -> None:
        """Take the lock; waits for at most `stale` seconds where only a heartbeat tells whether its holder lives.

        Raises:
            UserError: somebody else holds it.
        """
        self._made = [p for p in (self._directory, *self._directory.absolute().parents) if not p.exists()]
        self._directory.mkdir(parents=True, exist_ok=True)
        while not self._make():
            holder = self._read()
            if holder is None:  # it was given back in this moment
                continue
            if not self._is_gone(holder):
                raise UserError(
                    f"checkpoint.directory {self._directory} is in use by {holder}: wait for its end or end it, or "
                    "choose another folder"
                )
            self._take_away(holder)
        self._held = True
        threading.Thread(target=self._renew, name="lock", daemon=True).start()

    def release(self) -> None:
        """Give the lock back, and leave no empty folders behind that were not there before."""
        self._ended.set()
        if self._held and (holder := self._read()) is not None and holder.token == self._me.token:
            self._path.unlink(missing_ok=True)
        self._held = False
        for path in self._made:
            with suppress(OSError):
                path.rmdir()
        self._made = []

    def _make(self) -> bool:
        """Make the lock, if there is none."""
        own = self._directory / f"{NAME}.{self._me.token}"
        own.write_text(json.dumps(asdict(self._me)))
        try:
            with suppress(FileExistsError):
                os.link(own, self._path)
            return own.stat().st_nlink == 2  # which tells the truth also where the answer of a server was lost
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
                raise
            try:
                with os.fdopen(os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644), "w") as file:
                    file.write(own.read_text())
                return True
            except FileExistsError:
                return False
        finally:
            own.unlink()

    def _read(self) -> Holder | None:
        """Who holds the lock; None: nobody."""
        try:
            text = self._path.read_text()
        except FileNotFoundError:
            return None
        try:
            return Holder(**json.loads(text))
        except (ValueError, TypeError):  # made without links, and not written yet, or never
            return Holder("an unknown host", 0, "", "", "an unknown run", "", 0, "")

    def _is_gone(self, holder: Holder) -> bool:
        gone = holder.is_gone(self._me)
        if gone is not None:
            return gone
        if self._age(self._path) > self._stale:
            return True
        first, deadline, said = _time(self._path), time.monotonic() + self._stale, False
        while (now := _time(self._path)) == first and time.monotonic() < deadline:
            if not said:
                console().print(
                    f"checkpoint.directory {self._directory} was last held by {holder}: waiting for a sign of life "
                    f"for at most {self._stale:.0f} s",
                    soft_wrap=True,
                )
                said = True
            time.sleep(min(1.0, self._beat / 2))
        return now is None or now == first

    def _age(self, path: Path) -> float:
        """Seconds since a file was last renewed, by the clock of the file system."""
        probe = self._directory / f"{NAME}.{self._me.token}"
        probe.touch()
        try:
            then = _time(path)
            return 0.0 if then is None else (probe.stat().st_mtime_ns - then) / 1e9
        finally:
            probe.unlink()

    def _take_away(self, holder: Holder) -> None:
        """Remove the lock of `holder`, and no other's that was made since: one process does that at a time."""
        guard = self._directory / f"{NAME}.takeover"
        try:
            os.close(os.open(guard, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            if self._age(guard) > self._stale:  # who made it was killed in this moment
                guard.unlink(missing_ok=True)
            time.sleep(0.05)
            return
        try:
            if (found := self._read()) is not None and found.token == holder.token:
                self._path.unlink()
        finally:
            guard.unlink(missing_ok=True)

    def _renew(self) -> None:
        while not self._ended.wait(self._beat):
            with suppress(OSError):
                os.utime(self._path)


def _time(path: Path) -> int | None:
    """When a file was last renewed, in ns; opened, because NFS may remember an older answer."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None


def _started(pid: int) -> str | None:
    """When the kernel started a process, in ticks; None: there is none, it has ended, or this is no Linux.

    One that was killed stays in the table until its parent asks for its exit code, which the first process of many a
    container never does.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except (OSError, IndexError):
        return None


def _kernel() -> str:
    """What tells this kernel since it booted, and this namespace of processes, from others; empty: it is not known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""

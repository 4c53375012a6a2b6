"""How a run ends: signals unwind the process as exceptions, and all ranks agree on the reason of the one that failed.

A signal that would end the process becomes the exception `Terminated`, so that every `finally` on the way out runs;
while training goes on it is deferred to the end of the step, where the run is saved. The
rank that tracks may only see the consequence of another rank's failure, a broken collective; the first to fail
therefore leaves a note with its reason in the process group's store.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from ssam_scale.errors import RankLostError, UserError
from ssam_scale.tracking.store import one_line

# SIGHUP comes when the terminal of an interactive run closes; `nohup` sets it to be ignored, which is respected.
# SIGUSR1 is what Slurm's --signal is given to come before the time limit. SIGINT is Ctrl-C.
ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT)

SAVED = 75
"""The exit code of a run that a signal has ended and that was saved: EX_TEMPFAIL of sysexits.h, "try again"."""

# Long enough for a step of a large model to end and unwind; well below the 30 s that torchrun and Slurm wait before
# they send SIGKILL.
STUCK_AFTER_S = 8.0

# How long a deferred signal may wait for the end of a step and for what is collective before a checkpoint. SIGKILL
# follows SIGTERM after 30 s, of which the last records need some; SIGUSR1 comes as early as it was asked for.
PATIENCE_S = 15.0

# A launcher hands on a Ctrl-C that its processes have had from the terminal; after so long it is a second one.
_AGAIN_AFTER_S = 1.0


class Terminated(SystemExit):
    """A signal ended the process. As a SystemExit it prints no traceback and exits with 128 + the signal's number.

    Args:
        number: of the signal.
        saved: the checkpoint that goes on from there, in words: the exit code is SAVED then.
    """

    def __init__(self, number: int, saved: str | None = None) -> None:
        super().__init__(128 + number if saved is None else SAVED)
        self.signal_name, self.saved = signal.Signals(number).name, saved


class Unwinding:
    """Within the `with`, the first ending signal raises `Terminated` in the main thread; further ones are ignored.

    Ctrl-C raises `KeyboardInterrupt` as ever, unless it is deferred.

    Outside the main thread Python cannot install handlers; nothing is changed then.

    Args:
        on_stuck: called from another thread with the signal's name when the main thread has not left the `with`
            STUCK_AFTER_S after the signal. A main thread that waits in a collective for a rank that is gone never gets
            to run a handler; without this a killed run would look as if it still ran.

    Attributes:
        received: the first ending signal; None: there was none.
    """

    def __init__(self, on_stuck: Callable[[str], None] | None = None) -> None:
        self._on_stuck = on_stuck
        self._previous: dict[int, Any] = {}
        self._left = threading.Event()
        self._pipe: tuple[int, int] | None = None
        self._previous_fd = -1
        self._deferring = self._overdue = self._acted_on = False
        self._patience: threading.Timer | None = None
        self._interrupted: float | None = None  # when Ctrl-C came first
        self.received: int | None = None

    def __enter__(self) -> Unwinding:
        if threading.current_thread() is not threading.main_thread():
            return self
        for number in ENDING:
            # None: a handler that was not installed from Python and could not be put back. SIGUSR1 is ignored so that
            # it does not end a launcher, and not by the wish of somebody who closes a terminal.
            if signal.getsignal(number) not in (signal.SIG_IGN, None) or number == signal.SIGUSR1:
                self._previous[number] = signal.signal(number, self._handle)
        if self._on_stuck is not None:
            self._watch()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._left.set()
        if self._pipe is not None:
            signal.set_wakeup_fd(self._previous_fd)
            os.close(self._pipe[1])  # the thread reads the end of the pipe and returns
            self._pipe = None
        for number, handler in self._previous.items():
            # A launcher sends one more to all ranks when the first of them has ended: the exit code would be another.
            saved = isinstance(error, Terminated) and error.saved is not None
            signal.signal(number, signal.SIG_IGN if saved else handler)
        self._previous.clear()

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within, the first ending signal is `received` and raises nothing: who looks at it ends the process.

        Where nobody has for PATIENCE_S since SIGTERM, SIGHUP or Ctrl-C, it raises all the same, and so does a second
        Ctrl-C: somebody would rather not wait.
        """
        self._deferring, self._acted_on = True, False
        try:
            yield
        finally:
            self._deferring = False
            self.take_your_time()

    def take_your_time(self) -> None:
        """The deferred signal is being acted on, which neither time nor a further signal shall cut short."""
        self._acted_on = True
        patience, self._patience = self._patience, None
        if patience is not None:
            patience.cancel()
        self._overdue = False

    def shield(self) -> None:
        """From here to the end of the `with`, no ending signal interrupts; for short, bounded work."""
        self._left.set()
        if threading.current_thread() is threading.main_thread():
            for number in self._previous:
                signal.signal(number, signal.SIG_IGN)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._interrupts_now():
            raise KeyboardInterrupt
        first, self.received = self.received is None, self.received or number
        if self._overdue or (first and not self._deferring):
            self._overdue = False
            raise Terminated(self.received)
        if self._deferring and not self._acted_on and number != signal.SIGUSR1 and self._patience is None:
            self._patience = threading.Timer(PATIENCE_S, self._lose_patience, (threading.get_ident(), number))
            self._patience.daemon = True
            self._patience.start()

    def _interrupts_now(self) -> bool:
        """Whether Ctrl-C does not wait for who looks at `received`."""
        if not self._deferring or self._overdue:
            self._overdue = False
            return True
        now = time.monotonic()
        if self._interrupted is None:
            self._interrupted = now
        return now - self._interrupted >= _AGAIN_AFTER_S and not self._acted_on

    def _lose_patience(self, thread: int, number: int) -> None:
        """From another thread: let the handler run once more."""
        if self._deferring and self._patience is not None:
            self._overdue = True
            signal.pthread_kill(thread, number)

    def _watch(self) -> None:
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        # The interpreter writes each signal's number into the pipe from the C handler, even while the main thread is
        # deep inside native code and no Python handler can run.
        self._previous_fd = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        self._pipe = (read_end, write_end)
        threading.Thread(target=self._wait_for_signal, args=(read_end,), name="signals", daemon=True).start()

    def _wait_for_signal(self, read_end: int) -> None:
        try:
            while numbers := os.read(read_end, 64):
                ending = [number for number in numbers if number in self._previous]
                patience = STUCK_AFTER_S + (PATIENCE_S if self._deferring else 0.0)
                if ending and not self._left.wait(patience) and self._on_stuck is not None:
                    self._on_stuck(signal.Signals(ending[0]).name)
        finally:
            os.close(read_end)


def outcome(error: BaseException | None) -> tuple[str, str]:
    """MLflow's status of a run that ended with `error` (FINISHED, FAILED or KILLED), and why in one line."""
    if error is None or (isinstance(error, SystemExit) and not error.code):
        return "FINISHED", ""
    if isinstance(error, Terminated):
        return "KILLED", error.signal_name + ("" if error.saved is None else f", saved as {error.saved}")
    if isinstance(error, KeyboardInterrupt):
        return "KILLED", "SIGINT"
    if isinstance(error, (UserError, RankLostError)):
        return "FAILED", one_line(error)
    return "FAILED", f"{type(error).__name__}: {one_line(error)}"


_NOTE = "ssam_scale/tracking/outcome"  # its key in the process group's store

# A store whose host is gone may block for its own timeout of minutes; nobody waits that long for a note.
_NOTE_WITHIN_S = 2.0


def leave_note(status: str, line: str) -> None:
    """Tell the other ranks how this one ended, unless one already has. Never raises; does nothing on one process."""

    def write(store: Any, rank: int) -> None:
        store.compare_set(_NOTE, "", json.dumps({"status": status, "line": f"rank {rank}: {line}"}))

    _with_store(write)


def read_note() -> tuple[str, str] | None:
    """Status and reason of the first rank that left a note, or None. Never raises."""
    found: list[tuple[str, str]] = []

    def read(store: Any, rank: int) -> None:
        if store.check([_NOTE]):
            note = json.loads(store.get(_NOTE))
            found.append((str(note["status"]), str(note["line"])))

    _with_store(read)
    return found[0] if found else None


def _with_store(action: Callable[[Any, int], None]) -> None:
    """`action` with the store of the default process group and this process's rank, where there is a group."""
    # Never import torch for this: where it is not loaded there is no process group.
    dist = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return

    def attempt() -> None:
        # Any error means that the store is gone with its process; there is then nobody to tell.
        try:
            action(dist.distributed_c10d._get_default_store(), int(dist.get_rank()))
        except Exception:
            return

    thread = threading.Thread(target=attempt, name="note", daemon=True)
    thread.start()
    thread.join(_NOTE_WITHIN_S)

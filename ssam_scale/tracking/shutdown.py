"""How a run ends: signals unwind the process as exceptions, and all ranks agree on the reason of the one that failed.

A signal that would end the process becomes the exception `Terminated`, so that every `finally` on the way out runs. The
rank that tracks may only see the consequence of another rank's failure, a broken collective; the first to fail
therefore leaves a note with its reason in the process group's store.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from ssam_scale.errors import UserError
from ssam_scale.tracking.store import one_line

# SIGHUP comes when the terminal of an interactive run closes; `nohup` sets it to be ignored, which is respected.
ENDING = (signal.SIGTERM, signal.SIGHUP)

# Long enough for a step of a large model to end and unwind; well below the 30 s that torchrun and Slurm wait before
# they send SIGKILL.
STUCK_AFTER_S = 8.0


class Terminated(SystemExit):
    """A signal ended the process. As a SystemExit it prints no traceback and exits with 128 + the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal_name = signal.Signals(number).name


class Unwinding:
    """Within the `with`, the first ending signal raises `Terminated` in the main thread; further ones are ignored.

    Outside the main thread Python cannot install handlers; nothing is changed then.

    Args:
        on_stuck: called from another thread with the signal's name when the main thread has not left the `with`
            STUCK_AFTER_S after the signal. A main thread that waits in a collective for a rank that is gone never gets
            to run a handler; without this a killed run would look as if it still ran.
    """

    def __init__(self, on_stuck: Callable[[str], None] | None = None) -> None:
        self._on_stuck = on_stuck
        self._previous: dict[int, Any] = {}
        self._left = threading.Event()
        self._pipe: tuple[int, int] | None = None
        self._previous_fd = -1
        self.received: int | None = None

    def __enter__(self) -> Unwinding:
        if threading.current_thread() is not threading.main_thread():
            return self
        for number in ENDING:
            # None: a handler that was not installed from Python and could not be put back.
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
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
            signal.signal(number, handler)
        self._previous.clear()

    def shield(self) -> None:
        """From here to the end of the `with`, neither ending signals nor Ctrl-C interrupt; for short, bounded work."""
        self._left.set()
        if threading.current_thread() is threading.main_thread():
            for number in (*self._previous, signal.SIGINT):
                if signal.getsignal(number) is not None:
                    self._previous.setdefault(number, signal.getsignal(number))
                    signal.signal(number, signal.SIG_IGN)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = number
            raise Terminated(number)

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
                if ending and not self._left.wait(STUCK_AFTER_S) and self._on_stuck is not None:
                    self._on_stuck(signal.Signals(ending[0]).name)
        finally:
            os.close(read_end)


def outcome(error: BaseException | None) -> tuple[str, str]:
    """MLflow's status of a run that ended with `error` (FINISHED, FAILED or KILLED), and why in one line."""
    if error is None or (isinstance(error, SystemExit) and not error.code):
        return "FINISHED", ""
    if isinstance(error, Terminated):
        return "KILLED", error.signal_name
    if isinstance(error, KeyboardInterrupt):
        return "KILLED", "SIGINT"
    if isinstance(error, UserError):
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

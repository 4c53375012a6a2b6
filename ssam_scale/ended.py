"""How another process on this machine has ended: known to its parent, and for a moment to whoever looks."""

from __future__ import annotations

import os
import signal
from pathlib import Path

_MEANINGS = {
    signal.SIGKILL: "by somebody, or because the memory of the machine or of its job was exhausted",
    signal.SIGBUS: "a mapped file has become shorter, its disk failed, or /dev/shm is full",
    signal.SIGSEGV: "a mistake in compiled code",
    signal.SIGABRT: "compiled code gave up; its own last lines say why",
    signal.SIGILL: "an instruction that this processor does not have",
    signal.SIGFPE: "a division by zero in compiled code",
    signal.SIGXCPU: "its limit of processor time",
}


def signal_words(number: int) -> str:
    """A signal's name and what it mostly means: `SIGBUS (a mapped file has become shorter, …)`."""
    try:
        name = signal.Signals(number)
    except ValueError:  # of real time
        return f"signal {number}"
    meaning = _MEANINGS.get(name)
    return name.name if meaning is None else f"{name.name} ({meaning})"


def status_words(status: int) -> str:
    """What a status of `waitpid` says: `was killed by SIGKILL (…)` or `has ended with exit code 1`."""
    if os.WIFSIGNALED(status):
        return f"was killed by {signal_words(os.WTERMSIG(status))}"
    return f"has ended with exit code {os.WEXITSTATUS(status)}"


def status_of_dead(pid: int) -> int | None:
    """The status of a process that has ended and that its parent has not asked about yet; None: it is not known.

    A parent asks within a second, so that one has to look at once, as one can who polls a `pidfd`.
    """
    try:
        # The name, in brackets, may hold anything; the state comes after it, as the third of 52 fields.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return int(fields[49]) if fields[0] == "Z" else None

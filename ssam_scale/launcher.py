"""Ending with the launcher: a rank whose torchrun or deepspeed is gone would train on, and hold its GPU, unseen."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

# Between two looks. A launcher that ends orderly ends its ranks itself.
_EVERY_S = 1.0

# For a checkpoint and the run's last metrics. A rank that waits for another in a collective sees no signal.
GRACE_S = 60.0


@contextmanager
def ended_with_launcher(grace_s: float = GRACE_S) -> Iterator[None]:
    """Within the `with`, this process gets SIGTERM when the one that started it has ended, and SIGKILL after a while.

    Only under a launcher (`RANK` is set). By looking at the parent's id, not by PR_SET_PDEATHSIG: that comes when the
    thread ends that started a process, which for some launchers is not when they do.

    Args:
        grace_s: seconds between the two signals.
    """
    if "RANK" not in os.environ:
        yield
        return
    left = threading.Event()
    threading.Thread(target=_watch, args=(os.getppid(), left, grace_s), name="launcher", daemon=True).start()
    try:
        yield
    finally:
        left.set()


def _watch(launcher: int, left: threading.Event, grace_s: float) -> None:
    while os.getppid() == launcher:
        if left.wait(_EVERY_S):
            return
    rank = os.environ["RANK"]
    print(f"ssam-scale: rank {rank}: the launcher (process {launcher}) has ended; this ends, too", file=sys.stderr)
    os.kill(os.getpid(), signal.SIGTERM)
    if not left.wait(grace_s):
        os.kill(os.getpid(), signal.SIGKILL)

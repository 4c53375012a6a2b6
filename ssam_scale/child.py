"""`ssam-scale` in a process of its own, which ends with the one that began it."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

# What a launcher sets, under which this process may have been started.
_OF_LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")

# In the new process itself: a `preexec_fn` has Python fork, after which numba's threads here do not end any more.
_BEGIN = """
import ctypes, os, sys
if hasattr(libc := ctypes.CDLL(None), "prctl"):
    libc.prctl(1, int(sys.argv[1]))  # PR_SET_PDEATHSIG
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


def command(arguments: Sequence[str], processes: int = 1, ended_by: int = signal.SIGKILL) -> list[str]:
    """What starts `ssam-scale ARGUMENTS` for `subprocess`.

    Args:
        arguments: of the command line.
        processes: on this machine; torchrun starts more than one.
        ended_by: the signal that it gets where the thread that began it ends, on Linux.
    """
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    module = ["-m", *(launcher if processes > 1 else []), "ssam_scale"]
    return [sys.executable, "-c", _BEGIN, str(int(ended_by)), *module, *arguments]


def environment(threads: int | None) -> dict[str, str]:
    """This process's, without what a launcher has set in it, and without progress bars.

    Args:
        threads: that each process computes with; None: as many as it would anyway.
    """
    kept = {key: value for key, value in os.environ.items() if key not in _OF_LAUNCHERS}
    limits = {} if threads is None else dict.fromkeys(_THREADS, str(threads))
    return kept | limits | {"TQDM_DISABLE": "1"}

"""How much memory something takes beyond what was taken before."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def extra_bytes(work: Callable[[], Any], device: torch.device) -> int | None:
    """The peak of memory during `work`, its result included, over what was taken before it.

    On CUDA: what torch allocates (`torch.cuda.max_memory_allocated`). Otherwise the resident memory of this process:
    Linux is told to forget the peak (`/proc/self/clear_refs`) and asked for it afterwards (VmHWM minus the VmRSS of
    before, in `/proc/self/status`); free memory is given back first, so that none is taken unseen. Where that is not
    possible: None.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = work()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device)
        del result
        return peak - before
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
    except (OSError, AttributeError, StopIteration):
        work()
        return None
    result = work()
    peak = _status("VmHWM")
    del result
    return max(peak - before, 0)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))

"""Loops over single elements, compiled by numba for the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numba
import numpy as np
import torch
from torch import Tensor

# Elements at a time: of a task of one thread, or of one sequence of torch operations.
CHUNK = 2**20


def addresses(tensors: Sequence[Tensor]) -> Any:
    """int64 [tensors], where in memory each begins."""
    return np.array([t.data_ptr() for t in tensors], np.int64)


def in_threads(work: Callable[[slice], None], tasks: Any) -> None:
    """`work` on all of `tasks`, which is split among as many threads as torch computes with.

    Args:
        work: given a slice of the tasks; compiled code that lets other threads run.
        tasks: int64 [N, 2 or more], of which the last two columns tell the size of each.
    """
    done = (tasks[:, -1] - tasks[:, -2]).cumsum()
    total = int(done[-1]) if len(done) else 0
    threads = min(torch.get_num_threads(), -(-total // CHUNK))
    if threads <= 1:
        work(slice(0, len(tasks)))
        return
    inner = np.searchsorted(done, [total * n // threads for n in range(1, threads)]).tolist()
    edges = [0, *inner, len(tasks)]
    mine, *theirs = map(slice, edges, edges[1:])
    with ThreadPoolExecutor(threads - 1) as pool:
        others = [pool.submit(work, part) for part in theirs]
        work(mine)
        for other in others:
            other.result()


_Function = TypeVar("_Function", bound=Callable[..., Any])


def compiled(function: _Function) -> _Function:
    """`function` as machine code that is kept on disk, so that only the first run ever compiles.

    It runs without the interpreter's lock. numba's own threads stay out of it: loaders run compiled code in threads of
    theirs, and numba's default threading layer does not bear two callers.
    """
    try:
        result: _Function = numba.njit(nogil=True, error_model="numpy", cache=True)(function)
    except RuntimeError:  # no folder to keep machine code in: neither beside this file nor in the user's cache
        result = numba.njit(nogil=True, error_model="numpy")(function)
    return result

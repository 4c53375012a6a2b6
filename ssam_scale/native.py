"""Loops over single elements, compiled for the CPU: by numba, and by a C compiler where that is not enough."""

from __future__ import annotations

import ctypes
import hashlib
import os
import pickle
import platform
import shlex
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numba
import numpy as np
import torch
from numba.core.compiler_lock import global_compiler_lock
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
        result = numba.njit(nogil=True, error_model="numpy", cache=True)(function)
        # A disk that is full by now, or a file that is another user's or was cut off, is no reason to end a run.
        kept = result._cache
        kept.load_overload, kept.save_overload = _if_it_can(kept.load_overload), _if_it_can(kept.save_overload)
        # numba numbers the files of a function's machine code, by what its list of them holds. Two processes that
        # compile it for other types at one time take the same number, and one then runs the other's code.
        kept._cache_file._data_name = partial(_a_name_of_its_own, Path(kept._cache_file._index_name).stem)
    except RuntimeError:  # no folder to keep machine code in: neither beside this file nor in the user's cache
        result = numba.njit(nogil=True, error_model="numpy")(function)
    # Two threads that call a function for the first time make the same type twice, and write to one table of compiled
    # code at once, which then raises KeyError or has no end: numba's lock is held by its compiler alone.
    # An OrderedDict in which one key is twice is walked through for ever, a dict holds no key twice: seen once, in a
    # process whose loaders had compiled in threads for an hour, in spite of the lock.
    result.overloads = dict(result.overloads)
    for step in ("typeof_pyval", "compile", "_compile_for_args"):
        setattr(result, step, global_compiler_lock(getattr(result, step)))
    return result


def _a_name_of_its_own(function: str, number: int) -> str:
    return f"{function}.{number}.{uuid.uuid4().hex[:16]}.nbc"


def _if_it_can(of_cache: Callable[..., Any]) -> Callable[..., Any]:
    """A function of numba's cache that does nothing, and finds nothing, where it would fail."""

    def attempt(*args: Any) -> Any:
        with suppress(OSError, EOFError, pickle.UnpicklingError):
            return of_cache(*args)
        return None

    return attempt


def _whatever(library: ctypes.CDLL) -> None:
    pass


def c_library(
    source: Path, options: Sequence[str] = (), check: Callable[[ctypes.CDLL], None] = _whatever
) -> ctypes.CDLL | None:
    """A C file as a shared library; None: it cannot be compiled here.

    It is compiled when it is first needed, in half a second, and kept in the user's cache.

    Args:
        source: the file.
        options: of the compiler.
        check: raises OSError for a library that does not work here.
    """
    given = ["-O3", "-shared", "-fPIC", *options]
    compiler = shlex.split(os.environ.get("CC", "cc"))
    parts = [source.read_bytes(), *map(os.fsencode, (platform.machine(), *compiler, *given))]
    name = f"{source.stem}-{hashlib.sha256(bytes(1).join(parts)).hexdigest()[:16]}.so"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ssam_scale"

    def loaded(path: Path) -> ctypes.CDLL:
        found = ctypes.CDLL(str(path))
        check(found)
        return found

    with suppress(OSError):
        if (kept := cache / name).exists():
            return loaded(kept)
        cache.mkdir(parents=True, exist_ok=True)
    for place in (cache, None):  # where the cache cannot be written to, or is full, in a folder that goes away again
        with suppress(OSError, subprocess.SubprocessError), tempfile.TemporaryDirectory(dir=place) as folder:
            made = Path(folder) / name
            command = [*compiler, str(source), "-o", str(made), *given]
            subprocess.run(command, check=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=120)
            found = loaded(made)  # stays loaded without its file
            with suppress(OSError):  # another process may have been faster; any of them is as good
                made.replace(cache / name)
            return found
    return None

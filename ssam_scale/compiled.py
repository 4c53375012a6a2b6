"""Loops over single elements, compiled by numba for the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba

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

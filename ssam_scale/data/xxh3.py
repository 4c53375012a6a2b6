"""XXH3 of 64 bits, seed 0, by xxHash's own library, for Python and for compiled code: 9 µs for half a megabyte.

It finds damage, not malice: 60 GB/s of one core, where SHA-256 does 1.8. XXH64 takes six times as long.
"""

from __future__ import annotations

import ctypes
from typing import Any

import xxhash
from xxhash import _xxhash  # type: ignore[attr-defined]

SYMBOL = "XXH3_64bits"
"""The C function, in the library of `xxhash`'s extension module or in one that it is linked to."""


def xxh3(data: Any) -> int:
    """The hash of bytes, or of whatever lies in memory as a row of them."""
    return xxhash.xxh3_64_intdigest(data)


def address() -> int:
    """Where the C function lies: uint64 of a pointer and a uint64, how many bytes.

    Raises:
        ImportError: the extension module does not let it be seen.
    """
    library = ctypes.CDLL(_xxhash.__file__)
    try:
        found = getattr(library, SYMBOL)
    except AttributeError:
        raise ImportError(f"{library._name} has no {SYMBOL}: pip install --force-reinstall xxhash") from None
    return ctypes.cast(found, ctypes.c_void_p).value or 0

"""The compiled `crop.c`, which decodes no more of a JPEG than a crop shows.

It is compiled when it is first needed, in half a second, and kept in the user's cache. Where there is no compiler, or
no libjpeg-turbo with its header, JPEGs are decoded as a whole: the same pixels, in more time.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

SYMBOLS = ("ssam_scale_crop_new", "ssam_scale_crop_free", "ssam_scale_crop_decode")

_SOURCE = Path(__file__).with_name("crop.c")
_OPTIONS = ("-O3", "-shared", "-fPIC", "-ljpeg")


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library; None: it cannot be compiled here."""
    source = _SOURCE.read_bytes()
    compiler = shlex.split(os.environ.get("CC", "cc"))
    what = hashlib.sha256(b"\0".join([source, platform.machine().encode(), *map(os.fsencode, compiler)]))
    name = f"crop-{what.hexdigest()[:16]}.so"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ssam_scale"
    with suppress(OSError):
        if (kept := cache / name).exists():
            return _loaded(kept)
        cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache if os.access(cache, os.W_OK) else None) as folder:
        made = Path(folder) / name
        command = [*compiler, str(_SOURCE), "-o", str(made), *_OPTIONS]
        try:
            subprocess.run(command, check=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=120)
            found = _loaded(made)  # stays loaded without its file
        except (OSError, subprocess.SubprocessError):
            return None
        with suppress(OSError):  # another process may have been faster; any of them is as good
            made.replace(cache / name)
        return found


def _loaded(path: Path) -> ctypes.CDLL:
    """The library, which has created a decoder: libjpeg finds out then whether it is of its header's version.

    Raises:
        OSError: it is not, or cannot be loaded.
    """
    found = ctypes.CDLL(str(path))
    found.ssam_scale_crop_new.restype = ctypes.c_void_p
    decoder = found.ssam_scale_crop_new()
    if not decoder:
        raise OSError("libjpeg is of another version than its header")
    found.ssam_scale_crop_free(ctypes.c_void_p(decoder))
    return found

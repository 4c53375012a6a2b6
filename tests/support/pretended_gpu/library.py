"""Compiles `device.cpp` and loads it, before torch."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import subprocess
from pathlib import Path

_SOURCE = Path(__file__).parent / "device.cpp"


def load(devices: int) -> ctypes.CDLL:
    """The library, with so many devices in place. Torch looks for a device's hooks once, and must not have yet.

    Raises:
        RuntimeError: the compiler's message.
    """
    torch = _torch()
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(torch / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(str(_compiled(torch)))
    library.get_stream.restype = ctypes.c_long
    library.set_stream.argtypes = [ctypes.c_int, ctypes.c_long]
    library.pretend(devices)
    return library


def _torch() -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def _compiled(torch: Path) -> Path:
    """The library of this source and this torch, which is made once: some 10 s."""
    of = importlib.metadata.version("torch").encode() + str(torch).encode() + _SOURCE.read_bytes()
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ssam_scale"
    library = cache / f"pretended-gpu-{hashlib.sha256(of).hexdigest()[:16]}.so"
    if library.exists():
        return library
    cache.mkdir(parents=True, exist_ok=True)
    unfinished = library.with_suffix(f".{os.getpid()}")
    include = torch / "include"
    command = ["g++", "-O1", "-w", "-shared", "-fPIC", "-std=c++20", f"-I{include}"]
    command += [f"-I{include}/torch/csrc/api/include", str(_SOURCE), "-o", str(unfinished)]
    command += [f"-L{torch}/lib", "-lc10", "-ltorch_cpu"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the pretended GPU does not compile with this torch:\n{done.stderr[-3000:]}")
    unfinished.replace(library)
    return library

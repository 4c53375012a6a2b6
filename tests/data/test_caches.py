"""Compiled code that cannot be kept, or read, is compiled anew: no run ends for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import xxhash

from tests.support.checkout import ROOT

DATA = b"compiled"
HASHED = f"""
import resource, sys
import numpy, torch, numba
if sys.argv[1] == "full":
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
from ssam_scale.data import xxh64 as module
if sys.argv[1] == "unseen":  # as at the moment before another process writes its list
    for function in (module.xxh64, module._little_endian, module._merged, module._round, module._rotated):
        function._cache._cache_file._load_index = dict
data = numpy.frombuffer({DATA!r}, numpy.uint8)
print(int(module.xxh64(data.copy() if sys.argv[2] == "writable" else data)))
"""

pytestmark = pytest.mark.slow


def hashed(cache: Path | str, disk: str = "empty", array: str = "readonly") -> None:
    """In a process of its own, whose disk may be full, or may not show what others wrote."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", HASHED, disk, array], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, str(xxhash.xxh64_intdigest(DATA))), done.stderr


def test_a_cache_that_cannot_be_written() -> None:
    """In a folder of the kernel's, root cannot make one either."""
    hashed("/proc/nowhere")


def test_a_disk_that_is_full(tmp_path: Path) -> None:
    hashed(tmp_path, "full")
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size]


def test_a_cache_that_is_damaged(tmp_path: Path) -> None:
    """Its lists of machine code, and the code itself."""
    hashed(tmp_path)
    for suffix, content in ((".nbi", b"garbage"), (".nbc", b"")):
        damaged = list(tmp_path.rglob(f"*{suffix}"))
        assert damaged
        for path in damaged:
            path.write_bytes(content)
        hashed(tmp_path)


def test_two_processes_that_compile_at_one_time(tmp_path: Path) -> None:
    """For other types each: neither runs the other's code, whoever's list of the files is the one that stays."""
    for first, second in (("readonly", "writable"), ("writable", "readonly")):
        hashed(tmp_path, "unseen", first)
        hashed(tmp_path, "unseen", second)
        hashed(tmp_path, array=first)
        hashed(tmp_path, array=second)

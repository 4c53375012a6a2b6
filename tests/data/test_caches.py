"""Compiled code that cannot be kept, or read, is compiled anew: no run ends for it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest

from ssam_scale.native import compiled
from tests.support.checkout import ROOT

WEIGHED = """
import resource, sys
import torch, numba
if sys.argv[1] == "full":
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
from ssam_scale.data.resize import INTERPOLATIONS, weight
print(weight(INTERPOLATIONS.index("bicubic"), 0.5))
"""

pytestmark = pytest.mark.slow


def weighed(cache: Path | str, disk: str = "empty") -> None:
    """In a process of its own, whose disk may be full."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", WEIGHED, disk], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "0.5625"), done.stderr


def test_a_cache_that_cannot_be_written() -> None:
    """In a folder of the kernel's, root cannot make one either."""
    weighed("/proc/nowhere")


def test_a_disk_that_is_full(tmp_path: Path) -> None:
    weighed(tmp_path, "full")
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size]


def test_a_cache_that_is_damaged(tmp_path: Path) -> None:
    """Its lists of machine code, and the code itself."""
    weighed(tmp_path)
    for suffix, content in ((".nbi", b"garbage"), (".nbc", b"")):
        damaged = list(tmp_path.rglob(f"*{suffix}"))
        assert damaged
        for path in damaged:
            path.write_bytes(content)
        weighed(tmp_path)


def double(data: Any) -> Any:
    return data + data


def test_threads_that_compile_at_one_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """No two of them make numba's types or look at its tables: a type that is made twice breaks them."""
    kind = type(numba.types.Array)
    make, within, most = kind._intern, [0], [0]

    def slowly(self: Any, made: Any) -> Any:
        within[0] += 1
        most[0] = max(most[0], within[0])
        time.sleep(0.005)  # another thread may come in between
        within[0] -= 1
        return make(self, made)

    monkeypatch.setattr(kind, "_intern", slowly)
    function, begin = compiled(double), threading.Barrier(4)

    def call(count: int) -> None:
        begin.wait()
        for dimensions in range(5, 8):
            assert function(np.ones((1,) * dimensions, np.uint16)).sum() == 2

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(call, range(4)))
    assert most[0] == 1
    assert len(list(function.overloads.items())) == 3


def test_two_processes_that_compile_at_one_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For other types each, neither having seen the other's list of the files: no code is taken for the other's."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    one, other = (compiled(double)._cache._cache_file for _ in range(2))
    other._load_index = dict
    save = one._save_data

    def after_the_other(*args: Any) -> None:
        second = compiled(double)
        second._cache._cache_file = other
        second(1.5)
        save(*args)

    first = compiled(double)
    first._cache._cache_file, one._save_data = one, after_the_other
    first(np.int64(1))
    assert len(list(tmp_path.rglob("*.nbc"))) == 2
    for value in (1.5, np.int64(1)):
        assert compiled(double)(value) == 2 * value

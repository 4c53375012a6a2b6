"""Triton compiles a GPU's kernels, for each dtype and way in which they are launched: it needs no GPU for that."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.support.checkout import ROOT
from tests.support.processes import run

pytestmark = pytest.mark.slow

# In a process of its own, because Triton either interprets or compiles.
COMPILE = """
import itertools

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ssam_scale.masks.kernels import gpu

compiled = 0


def build(kernel, signature, **constants):
    global compiled
    names = kernel.arg_names
    signature = {name: signature.get(name, "constexpr") for name in names}
    places = {(names.index(name),): value for name, value in {**constants, "BLOCK": gpu.BLOCK}.items()}
    triton.compile(ASTSource(kernel, signature, places), target=GPUTarget("cuda", 80, 32))
    compiled += 1


TABLES = {"table": "*i64", "blocks": "*i32"}
build(gpu._count, {**TABLES, "counts": "*i32"})
for dtype, strided in itertools.product((tl.float32, tl.bfloat16, tl.float16, tl.float64), (False, True)):
    wide = tl.float64 if dtype == tl.float64 else tl.float32
    sums = "*fp64" if dtype == tl.float64 else "*fp32"
    build(gpu._select, TABLES, T=dtype, STRIDED=strided)
    build(gpu._scatter, TABLES, T=dtype, STRIDED=strided)
    build(gpu._squares, {**TABLES, "sums": sums}, T=dtype, WIDE=wide, STRIDED=strided)
    build(gpu._total, {"sums": sums, "bounds": "*i32", "totals": sums}, WIDE=wide)
    for whole, scaled in itertools.product((False, True), repeat=2):
        types = {**TABLES, "alpha": "*fp32", "when": "*i1"} if scaled else TABLES
        absent = {} if scaled else {"alpha": None, "when": None}
        how = {"T": dtype, "V": tl.float32, "WIDE": wide, "STRIDED": strided, "KEEP": scaled}
        build(gpu._add, types, **how, **absent, WHOLE=whole, V_STRIDED=whole and strided)
print(compiled)
"""


def test_every_kernel_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    ended = run([sys.executable, "-c", COMPILE], cwd=ROOT, env={"TRITON_CACHE_DIR": str(tmp_path)})
    assert ended.returncode == 0, ended.stdout
    assert ended.stdout.split()[-1] == "65"  # behind warnings, if there are any

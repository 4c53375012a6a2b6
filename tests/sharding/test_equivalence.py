"""N ranks on any backend, with any mask, norm and precision, equal the slow reference on the concatenated batch."""

from __future__ import annotations

import itertools

import pytest

from tests.support.cases import CASES, each_option_once
from tests.support.ranks import alone, run_ranks
from tests.support.tiers import few
from tests.support.training import check, train

BACKENDS = ("ddp", "fsdp2", "zero0", "zero1", "zero2", "zero3")
# Numbers that split tensors unevenly, or leave ranks with nothing of some, and a rank that is alone in a process group.
OTHER_SIZES = {1: ("fsdp2",), 3: ("fsdp2", "zero3"), 4: ("zero0", "zero2")}
# A mask of whole tensors, of rows, of single weights, and a cut.
KINDS = (
    "vit tensor, calibrated norm, adamw, adaptive",
    "resnet row, dense norm, 2 micro-batches",
    "resnet 1:4, adamw",
    "vit element, radii 0.1 and 0.0, CosineRadius",
    "convnext moving cut, 2 micro-batches, adamw, 0.3 of the batch",
    "vit moving cut, 2 micro-batches, bfloat16",
    "vit moving cut, Friendly",
)
# Stages that differ in what DeepSpeed reduces, and not in how masks, norms and schedules are computed.
ALIKE = {"zero0": KINDS[:2], "zero1": KINDS[2:4], "zero2": KINDS}
# Which samples a pass sees is decided before anything is sharded.
CHOSEN = (
    "vit dense, 0.5 of the batch highest_loss, descent 0.5 highest_loss",
    "vit fixed cut, adamw, adaptive, descent 0.25 highest_loss",
    "resnet moving cut, 0.5 of the batch random, descent 0.75 random",
    "vit element, 2 micro-batches, 0.5 of the batch random",
    "vit moving cut, 0.25 of the batch highest_loss",
    "resnet moving cut, 0.5 of the batch",
)
UNEVEN = (
    "resnet tensor",
    "vit moving cut, calibrated norm, 2 micro-batches",
    "vit row, radii 0.1 and 0.0, adaptive",
    "resnet 1:4, adamw",
)


@pytest.mark.parametrize(
    "name", [name if name in each_option_once() else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_one_process_equals_the_reference(name: str) -> None:
    check([CASES[name]], [alone(train, "single", [CASES[name]])], "single")


def on_ranks(size: int, backend: str, name: str) -> None:
    check([CASES[name]], run_ranks(size, train, backend, [CASES[name]]), backend)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "name"),
    [
        (backend, name)
        for backend in BACKENDS
        for name in (ALIKE[backend] if backend in ALIKE else each_option_once())
        if name not in CHOSEN or backend == "fsdp2"
    ],
)
def test_two_ranks_equal_the_reference_with_every_option_on_every_backend(backend: str, name: str) -> None:
    on_ranks(2, backend, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", UNEVEN)
@pytest.mark.parametrize(
    "where",
    few([(size, each) for size, some in OTHER_SIZES.items() for each in some], (3, "zero3"), (4, "zero2")),
    ids=str,
)
def test_other_numbers_of_ranks_equal_the_reference(where: tuple[int, str], name: str) -> None:
    on_ranks(*where, name)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("size", "backend"), list(itertools.product((1, 2, 3, 4), BACKENDS)))
def test_every_case_on_every_backend_and_number_of_ranks(size: int, backend: str, name: str) -> None:
    on_ranks(size, backend, name)

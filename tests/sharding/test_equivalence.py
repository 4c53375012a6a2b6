"""N ranks on any backend, with any mask, norm and precision, equal the slow reference on the concatenated batch."""

from __future__ import annotations

import pytest

from tests.support.cases import CASES
from tests.support.ranks import alone, run_ranks
from tests.support.training import Case, check, train_all

ALL = list(CASES.values())
# Less of everything, where the number of ranks splits tensors unevenly or leaves ranks with nothing of some.
FEW = [
    CASES[name]
    for name in (
        "resnet tensor",
        "vit moving cut, adamw",
        "vit moving cut, calibrated norm, 2 micro-batches",
        "vit tensor, calibrated norm, adamw, adaptive",
        "resnet moving cut, 0.5 of the batch",
        "vit dense, Interval, 0.25 of the batch",
        "vit moving cut, 2 micro-batches, bfloat16",
        "vit row, radii 0.1 and 0.0, adaptive",
        "resnet 1:4, adamw",
        "vit dynamic, 2 micro-batches",
        "vit late, adamw",
        "vit cut by cost",
    )
]


def test_one_process_equals_the_reference() -> None:
    work = {"single": ALL}
    check(work, [alone(train_all, work)])


# Every number of ranks with every backend holds; to save time, what differs in little is left out.
WORK: dict[int, dict[str, list[Case]]] = {
    1: {"fsdp2": FEW},
    2: {"fsdp2": ALL, "zero3": ALL, "ddp": FEW, "zero1": FEW},
    3: {"fsdp2": FEW, "zero3": FEW},
    4: {"zero0": FEW[:3], "zero2": FEW},
}


@pytest.mark.slow
@pytest.mark.parametrize("size", WORK)
def test_ranks_equal_the_reference_on_the_concatenated_batch(size: int) -> None:
    check(WORK[size], run_ranks(size, train_all, WORK[size]))

"""One function decides how the images of a step are shared out to processes and micro-batches."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssam_scale.config.micro_batches import MicroBatches, accumulation_on, micro_batches
from ssam_scale.errors import UserError
from tests.support.configs import SMALL


@pytest.fixture
def shared_out(read: Any) -> Any:
    def shared_out(batch: int, processes: int, *overrides: str, found: int | None = None) -> MicroBatches:
        return micro_batches(read(SMALL, [f"data.batch_size={batch}", *overrides]), processes, found)

    return shared_out


def test_the_same_batch_on_any_number_of_processes(shared_out: Any) -> None:
    limited = {
        processes: (split.accumulation, split.images)
        for processes in (1, 4, 8, 16, 64, 4096)
        for split in [shared_out(4096, processes, "train.max_micro_batch=256")]
    }
    assert limited == {1: (16, 256), 4: (4, 256), 8: (2, 256), 16: (1, 256), 64: (1, 64), 4096: (1, 1)}


def test_what_divides_evenly(shared_out: Any) -> None:
    """13 · 7 images a process: of 50 at the most there are two micro-batches of 45.5, so seven of 13."""
    assert shared_out(182, 2, "train.max_micro_batch=50") == MicroBatches(2, 7, 13)
    assert shared_out(182, 2, "train.max_micro_batch=91") == MicroBatches(2, 1, 91)
    assert shared_out(182, 2, "train.max_micro_batch=1") == MicroBatches(2, 91, 1)
    assert shared_out(13, 1, "train.max_micro_batch=12") == MicroBatches(1, 13, 1)


def test_what_is_not_limited(shared_out: Any) -> None:
    assert shared_out(128, 4) == MicroBatches(4, 1, 32)
    assert shared_out(128, 4, "train.accumulation=2") == MicroBatches(4, 2, 16)
    assert shared_out(128, 4, "train.accumulation=2", "train.max_micro_batch=16") == MicroBatches(4, 2, 16)
    assert shared_out(128, 4, "train.max_micro_batch=auto") == MicroBatches(4, 1, 32)
    assert shared_out(128, 4, "train.max_micro_batch=auto", found=10) == MicroBatches(4, 4, 8)


def test_a_run_that_goes_on_with_fewer_processes_takes_more_of_its_micro_batches(shared_out: Any) -> None:
    assert shared_out(128, 2, found=32) == MicroBatches(2, 2, 32)
    assert shared_out(128, 1, found=32) == MicroBatches(1, 4, 32)
    assert shared_out(96, 2, found=32) == MicroBatches(2, 2, 24)
    assert shared_out(128, 1, "train.accumulation=2", found=32) == MicroBatches(1, 2, 64)
    assert shared_out(128, 1, "train.max_micro_batch=64", found=32) == MicroBatches(1, 2, 64)


def test_what_cannot_be(shared_out: Any) -> None:
    for batch, processes, override, message in (
        (128, 3, "train.seed=0", "does not divide over 3 processes; use a multiple of 3, such as 126 or 129"),
        (
            128,
            3,
            "train.max_micro_batch=8",
            "does not divide over 3 processes; use a multiple of 3, such as 126 or 129",
        ),
        (2, 3, "train.seed=0", "data.batch_size 2 does not divide over 3 processes; use a multiple of 3, such as 3"),
        (128, 64, "train.accumulation=4", "over 64 processes with 4 micro-batches each; use a multiple of 256"),
    ):
        with pytest.raises(UserError) as caught:
            shared_out(batch, processes, override)
        assert message in str(caught.value)
    with pytest.raises(UserError) as caught:
        shared_out(128, 2, "train.accumulation=2", "train.max_micro_batch=31")
    assert str(caught.value) == (
        "train.accumulation 2 makes micro-batches of 32 images on 2 processes, above train.max_micro_batch 31; leave "
        "train.accumulation out, which max_micro_batch then chooses"
    )


@given(st.integers(1, 64), st.integers(1, 600), st.integers(1, 600))
def test_it_is_the_fewest(processes: int, part: int, largest: int) -> None:
    class Said:
        accumulation = None
        max_micro_batch = largest

    config: Any = type("Config", (), {"train": Said})
    count = accumulation_on(config, processes, batch=processes * part)
    assert part % count == 0
    assert part // count <= largest
    assert not [c for c in range(1, count) if part % c == 0 and part // c <= largest]

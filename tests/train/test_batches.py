"""What a step is given: what was looked at before comes again, and the next step's is made beside the one before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
import torch
from torch import Tensor

from ssam_scale.data import Batch
from ssam_scale.data.aside import Aside
from ssam_scale.train.batches import EpochBatches


class Recorder:
    """Stands for the stream beside the training step: notes what is done there and what is handed over."""

    overlaps = True

    def __init__(self) -> None:
        self.inside = False
        self.handed: list[int] = []

    def __enter__(self) -> Recorder:
        self.inside = True
        return self

    def __exit__(self, *exception: object) -> None:
        self.inside = False

    def hand_over(self, tensors: tuple[Tensor, Tensor]) -> None:
        self.handed.append(int(tensors[1][0]))


class Loader:
    """Batches 0, 1, 2, … of two samples; `read` counts them, and `closed` tells whether the iteration was ended."""

    def __init__(self, batches: int, aside: Any = None) -> None:
        self.batches = batches
        self.aside = Aside(torch.device("cpu")) if aside is None else aside
        self.read = 0
        self.closed = False

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Batch]:
        try:
            for i in range(self.batches):
                self.read += 1
                yield Batch(torch.full((2, 1), float(i)), torch.full((2,), i))
        finally:
            self.closed = True


def epoch(loader: Loader, *options: Any) -> Any:
    return closing(EpochBatches(loader, *options))  # type: ignore[arg-type]


def numbers(batches: list[Any]) -> list[int]:
    return [int(labels[0]) for _, labels in batches]


def test_what_is_looked_at_comes_again_in_its_order() -> None:
    loader = Loader(5)
    with epoch(loader) as batches:
        assert numbers(batches.ahead(3)) == [0, 1]
        assert numbers(batches.ahead(2)) == [0]
        assert numbers(batches.next_step()) == [0]
        assert numbers(batches.ahead(4)) == [1, 2]
        assert [numbers(batches.next_step()) for _ in range(3)] == [[1], [2], [3]]
        assert numbers(batches.ahead(100)) == [4]
        assert numbers(batches.next_step()) == [4]
        assert batches.ahead(1) == []
        with pytest.raises(StopIteration):
            batches.next_step()
    loader = Loader(5)
    with epoch(loader) as batches:
        batches.ahead(1)
    assert loader.closed


def test_a_step_has_its_micro_batches_transformed_in_order() -> None:
    seen: list[int] = []

    def transform(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(int(labels[0]))
        return images, labels + 100

    loader = Loader(5)
    with epoch(loader, transform, 2) as batches:
        assert numbers(batches.ahead(1)) == [0]
        assert numbers(batches.next_step()) == [100, 101]
        batches.prefetch()  # on the CPU it would only come earlier
        assert (loader.read, seen) == (2, [0, 1])
        assert numbers(batches.ahead(3)) == [2, 3]
        assert numbers(batches.next_step()) == [102, 103]
        assert seen == [0, 1, 2, 3]


def test_the_next_steps_batches_are_made_beside_the_step_before_and_can_still_be_looked_at() -> None:
    aside = Recorder()
    drawn: list[tuple[int, bool]] = []

    def transform(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        drawn.append((int(labels[0]), aside.inside))
        return images, labels + 100

    loader = Loader(5, aside)
    with epoch(loader, transform, 2, 2) as batches:
        assert numbers(batches.next_step()) == [100, 101]
        batches.prefetch()
        assert loader.read == 4
        assert drawn == [(0, True), (1, True), (2, True), (3, True)]
        assert aside.handed == [100, 101, 102, 103]
        assert numbers(batches.ahead(4)) == [2, 3]  # not mixed
        batches.prefetch()
        assert numbers(batches.next_step()) == [102, 103]
        assert len(drawn) == 4
        batches.prefetch()  # what an epoch's steps leave over is nobody's
        assert loader.read == 4


def test_each_step_begins_once_and_before_anything_is_drawn_for_it() -> None:
    events: list[str] = []

    def transform(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        events.append(f"mixed {int(labels[0])}")
        return images, labels

    with epoch(Loader(4, Recorder()), transform, 2, 2, lambda step: events.append(f"step {step}")) as batches:
        batches.ahead(3)
        batches.peek()
        batches.next_step()
        assert events == ["step 0", "mixed 0", "mixed 1"]
        batches.prefetch()
        batches.peek()
        batches.next_step()
        assert events[3:] == ["step 1", "mixed 2", "mixed 3"]

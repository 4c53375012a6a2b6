"""How many threads decode: the fewest that are as fast as the fastest, and what is seen does not depend on it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ssam_scale.data.images import Indices
from ssam_scale.data.workers import Workers, candidates, fewest, measured
from tests.support.loaders import evaluation, training


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ({1: 100.0}, 1),
        ({8: 780.0, 4: 400.0}, 8),
        ({8: 400.0, 4: 390.0, 2: 200.0}, 4),  # no more than two or three cores are free
        ({8: 390.0, 4: 400.0, 2: 381.0, 1: 200.0}, 2),
        ({8: 100.0, 4: 101.0, 2: 100.0, 1: 99.0}, 1),  # a disk that gives no more
        ({8: 400.0, 4: 379.0}, 8),
    ],
    ids=["one core", "all", "half", "fewer", "disk", "just too slow"],
)
def test_the_fewest_that_are_within_five_percent_of_the_fastest(rates: dict[int, float], expected: int) -> None:
    assert fewest(rates) == expected


@pytest.mark.parametrize(
    ("most", "expected"), [(1, [1]), (2, [2, 1]), (6, [6, 4, 2, 1]), (8, [8, 4, 2, 1]), (24, [24, 16, 8, 4, 2, 1])]
)
def test_what_is_tried(most: int, expected: list[int]) -> None:
    assert candidates(most) == expected


@pytest.mark.parametrize(
    ("cores", "most", "expected"), [(16, 16, 16), (4, 16, 4), (6, 16, 8), (1, 16, 1), (64, 6, 6), (64, 1, 1)]
)
def test_of_threads_that_share_so_many_cores(cores: int, most: int, expected: int) -> None:
    """Images take a millisecond each, and as many are decoded at a time as there are cores."""
    asked: list[tuple[int, int]] = []

    def seconds(images: Indices, threads: int) -> float:
        asked.append((len(images), threads))
        return 0.001 * len(images) / min(cores, threads)

    found = measured(seconds, np.arange(1000), most)
    assert found.count == expected
    assert all(count <= 250 for count, _ in asked)  # what one thread decodes in a quarter of a second
    assert len(asked) <= 3 + 3 * len(candidates(most))
    if cores == most == 16:
        assert {threads for _, threads in asked[3:]} == {16, 8}  # fewer are hopeless


def test_what_was_found_is_a_line() -> None:
    assert str(Workers(1)) == "1 loader thread"
    assert str(Workers(4, {8: 3651.2, 4: 3600.0, 2: 1800.0})) == (
        "4 loader threads, 3,600 images/s (3,651 with 8, 1,800 with 2)"
    )


def test_a_measured_number_of_threads_changes_no_image(numbered: Path) -> None:
    """Also not those that it was measured by, which are the first batch's."""
    for read in (training, evaluation):
        auto, plain = read(numbered, workers="auto"), read(numbered, workers=1)
        assert auto.workers.count >= 1
        assert plain.workers == Workers(1)
        for mine, theirs in zip(auto, plain, strict=True):
            assert torch.equal(mine.images, theirs.images)
            assert torch.equal(mine.labels, theirs.labels)

"""Some images that are measured with: the same ones always, as evaluations see them, whoever shares them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ssam_scale.data import sample_loader
from ssam_scale.errors import UserError
from tests.support.loaders import NUMBERED, config, evaluation, training


def sample(beton: Path, images: int, rank: int = 0, world_size: int = 1, **values: Any) -> dict[int, Tensor]:
    """The images by their numbers, which are their labels."""
    loader = sample_loader(
        config(beton, **values),
        beton,
        images,
        rank=rank,
        world_size=world_size,
        device=torch.device("cpu"),
        batch=4,
        num_classes=NUMBERED,
    )
    return {int(label): image for batch in loader for image, label in zip(*batch, strict=True)}


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_share_the_same_choice_of_images_as_evaluations_see_them(numbered: Path, processes: int) -> None:
    every = {int(y): x for batch in evaluation(numbered) for x, y in zip(*batch, strict=True)}
    parts = [sample(numbered, 11, rank, processes) for rank in range(processes)]
    numbers = [number for part in parts for number in part]
    assert numbers == sorted(set(numbers)) == sorted(sample(numbered, 11))
    assert len(numbers) == 11
    assert numbers[-1] > 30  # a file may be sorted by class: not the first ones
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    for part in parts:
        assert all(torch.equal(image, every[number]) for number, image in part.items())


def test_of_the_training_images_only_those_that_are_trained_on(numbered: Path) -> None:
    trained = {int(label) for _, labels in training(numbered, subset=24) for label in labels}
    assert len(trained) == 24
    assert set(sample(numbered, 10, subset=24)) < trained
    assert set(sample(numbered, 1000, subset=24)) == trained
    assert set(sample(numbered, 1000)) == set(range(NUMBERED))


def test_fewer_images_than_processes_are_a_line(numbered: Path) -> None:
    with pytest.raises(UserError, match="2 images are fewer than one for each of 3 processes"):
        sample(numbered, 2, 0, 3)

"""Augmented batches are a function of seed, epoch and image: the same for any processes, workers and starts."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from ssam_scale.data import ImageLoader, inspect
from ssam_scale.data.beton import Sidecar
from ssam_scale.data.device_augment import device_augment
from tests.support.loaders import NUMBERED, config, evaluation, training

EVERYTHING: dict[str, Any] = {
    "augment": {"policy": "rand_augment_increasing"},
    "color_jitter": 0.4,
    "erasing": 0.5,
}
POLICIES = ["rand_augment", "rand_augment_increasing", "trivial_augment", "auto_augment", "three_augment"]


def read(loader: ImageLoader, epoch: int = 1, seen: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    loader.set_epoch(epoch, seen)
    return [(batch.images, batch.labels) for batch in loader]


def assert_equal(one: Any, two: Any) -> None:
    assert len(one) == len(two) > 0
    for batch, other in zip(one, two, strict=True):
        assert all(map(torch.equal, batch, other))


@pytest.mark.parametrize("policy", POLICIES)
def test_processes_share_the_augmented_batches_of_one(numbered: Path, policy: str) -> None:
    given = {**EVERYTHING, "augment": {"policy": policy}}
    alone = read(training(numbered, **given))
    for processes in (2, 4):
        ranks = [read(training(numbered, rank, processes, workers=2, **given)) for rank in range(processes)]
        together = [tuple(map(torch.cat, zip(*batches, strict=True))) for batches in zip(*ranks, strict=True)]
        assert_equal(together, alone)
    assert_equal(read(training(numbered, **given), seen=16), alone[2:])


@pytest.mark.parametrize("key", EVERYTHING)
def test_each_does_something_and_other_things_in_other_epochs(numbered: Path, key: str) -> None:
    plain, loader = read(training(numbered)), training(numbered, **{key: EVERYTHING[key]})
    found, again = read(loader), read(loader)
    assert_equal(found, again)
    assert [labels.tolist() for _, labels in found] == [labels.tolist() for _, labels in plain]
    changed = [
        float((one != other).any((1, 2, 3)).float().mean()) for (one, _), (other, _) in zip(found, plain, strict=True)
    ]
    assert 0.3 < np.mean(changed) <= 1.0
    assert not torch.equal(read(loader, 2)[0][0], found[0][0])
    assert not torch.equal(read(training(numbered, seed=4, **{key: EVERYTHING[key]}))[0][0], found[0][0])


def test_batches_are_the_callers_to_keep(numbered: Path) -> None:
    """Operations are done to a copy of what FFCV fills again."""
    loader = training(numbered, augment={"policy": "rand_augment"})
    kept = [batch.images for batch in loader]
    assert_equal([(images,) for images in kept], [(images,) for images, _ in read(loader, 0)])


def test_evaluation_is_not_augmented(numbered: Path) -> None:
    assert_equal(
        [(b.images, b.labels) for b in evaluation(numbered, **EVERYTHING)],
        [(b.images, b.labels) for b in evaluation(numbered)],
    )


def test_a_batch_without_a_box_is_left_alone(numbered: Path) -> None:
    augment = device_augment(config(numbered, erasing=1e-6), 0)
    assert augment is not None
    images = torch.randn(4, 3, 24, 24)
    before = images.clone()
    augment.normalised_(images, np.arange(4), 0)
    assert torch.equal(images, before)
    assert device_augment(config(numbered), 0) is None


# ----------------------------------------------------------------------------------------------- repeated augmentation


@pytest.mark.parametrize("repeats", [2, 3, 7])
def test_an_epoch_has_some_images_and_each_several_times(numbered: Path, repeats: int) -> None:
    loader = training(numbered, repeats=repeats, batch_size=1)
    seen: list[int] = []
    for epoch in range(3):
        labels = [int(label) for _, labels in read(loader, epoch) for label in labels]
        assert len(labels) == NUMBERED
        times = Counter(labels)
        assert len(times) == -(-NUMBERED // repeats)
        assert max(times.values()) == repeats
        assert sum(times.values()) == NUMBERED
        seen += times
    assert len(set(seen)) > -(-NUMBERED // repeats), "other images in other epochs"


def test_copies_meet_in_a_batch_differ_and_are_no_neighbours(numbered: Path) -> None:
    """So that mixup, which mixes the first with the second and so on, mixes no image with itself."""
    for images, labels in read(training(numbered, repeats=2, batch_size=16)):
        assert len(set(labels.tolist())) == 8
        assert (labels[::2] != labels[1::2]).all()
        for label in set(labels.tolist()):
            one, other = images[labels == label]
            assert not torch.equal(one, other)


def test_repeats_are_shared_by_processes_and_go_on_in_the_middle(numbered: Path) -> None:
    given = {"repeats": 3, **EVERYTHING}
    alone = read(training(numbered, **given))
    ranks = [read(training(numbered, rank, 2, **given)) for rank in range(2)]
    assert_equal([tuple(map(torch.cat, zip(*b, strict=True))) for b in zip(*ranks, strict=True)], alone)
    assert_equal(read(training(numbered, **given), seen=8), alone[1:])


def test_batches_say_which_images_and_not_which_copies(numbered: Path) -> None:
    loader = training(numbered, repeats=3, indices=True, **EVERYTHING)
    for batch in loader:
        assert torch.equal(batch.indices, batch.labels)  # type: ignore[attr-defined]


def test_a_damaged_image_is_replaced_in_all_its_copies(numbered: Path, tmp_path: Path) -> None:
    path = tmp_path / numbered.name
    for file in (numbered, Sidecar.path(numbered)):
        shutil.copy2(file, tmp_path / file.name)
    loader = training(path, repeats=2, on_damaged="skip", indices=True)
    loader.set_epoch(0)
    first = int(next(iter(loader)).labels[0])
    loader.close()
    beton = inspect(path)
    with path.open("r+b") as file:
        place = int(beton.starts[first]) + random.Random(0).randrange(int(beton.sizes[first]))
        file.seek(place)
        byte = file.read(1)[0] ^ 1
        file.seek(place)
        file.write(bytes([byte]))
    loader = training(path, repeats=2, on_damaged="skip", indices=True, **EVERYTHING)
    seen = list(loader)
    other = loader.damaged[first]
    for batch in seen:
        assert first not in batch.labels.tolist()
        assert torch.equal(batch.indices, batch.labels)  # type: ignore[attr-defined]
    assert sum(label == other for batch in seen for label in batch.labels.tolist()) >= 2


def test_pages_are_not_repeated(numbered: Path) -> None:
    with pytest.raises(ValidationError, match="repeats: an order by pages reads each image once; use order: random"):
        config(numbered, repeats=2, order="pages")

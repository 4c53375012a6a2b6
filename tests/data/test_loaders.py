"""Reading: repeatable bit for bit, independent of how many processes and workers share the work, nothing lost."""

from __future__ import annotations

import gc
import math
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ssam_scale.data import ImageLoader, IndexedBatch, inspect
from ssam_scale.data.augment import random_crop, sample_key, uniform
from ssam_scale.data.encode import Encoding
from ssam_scale.data.sources import Sample
from ssam_scale.data.workers import Workers
from ssam_scale.data.write import write_samples
from ssam_scale.errors import UserError
from ssam_scale.models.torchvision_ops import ensure_torchvision
from tests.support.images import make_image
from tests.support.loaders import NUMBERED, config, evaluation, training

Epoch = list[tuple[torch.Tensor, torch.Tensor]]


def read(loader: ImageLoader, epoch: int = 0) -> Epoch:
    loader.set_epoch(epoch)
    return [(batch.images, batch.labels) for batch in loader]


def by_label(epoch: Epoch) -> dict[int, torch.Tensor]:
    return {int(label): image for images, labels in epoch for image, label in zip(images, labels, strict=True)}


def assert_equal(one: Epoch, two: Epoch) -> None:
    assert len(one) == len(two)
    for (images_1, labels_1), (images_2, labels_2) in zip(one, two, strict=True):
        assert torch.equal(labels_1, labels_2)
        assert torch.equal(images_1, images_2)


def test_shapes_and_types(numbered: Path) -> None:
    loader = training(numbered)
    batches = read(loader)
    assert len(batches) == len(loader) == loader.batches_everywhere == NUMBERED // 8
    assert loader.images == 8 * len(loader)
    for images, labels in batches:
        assert images.shape == (8, 3, 24, 24)
        assert images.dtype == torch.float32
        assert labels.shape == (8,)
        assert labels.dtype == torch.int64
        assert images.is_contiguous()


GROWS = {"resolution": 8, "from_epoch": 0, "to_epoch": 4, "multiple_of": 4}


@pytest.mark.parametrize("workers", [1, 3])
def test_crops_that_grow_are_in_each_epoch_those_of_that_side(numbered: Path, workers: int) -> None:
    growing = training(numbered, progressive=GROWS, workers=workers)
    for epoch, side in ((0, 8), (1, 12), (2, 16), (3, 20), (4, 24), (9, 24), (1, 12)):
        found = read(growing, epoch)
        assert found[0][0].shape == (8, 3, side, side)
        assert_equal(found, read(training(numbered, resolution=side), epoch))
    growing.set_epoch(2, seen=16)
    assert_equal([tuple(batch) for batch in growing], read(training(numbered, resolution=16), 2)[2:])


def test_normalisation(numbered: Path) -> None:
    plain = read(evaluation(numbered, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)))[0][0]
    ours = read(evaluation(numbered))[0][0]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    assert plain.min() >= 0
    assert 0.9 < plain.max() <= 1
    torch.testing.assert_close(ours, (plain - mean) / std, atol=1e-5, rtol=0)


def test_an_epoch_repeats_bit_for_bit_and_resumes_in_the_middle_of_a_run(numbered: Path) -> None:
    uninterrupted = training(numbered)
    epochs = [read(uninterrupted, epoch) for epoch in range(3)]
    assert_equal(read(uninterrupted, 1), epochs[1])
    assert_equal(read(training(numbered), 2), epochs[2])
    assert not torch.equal(epochs[0][0][1], epochs[1][0][1])


@pytest.mark.parametrize("order", ["random", "pages"])
def test_an_epoch_goes_on_behind_what_was_seen_of_it(numbered: Path, order: str) -> None:
    whole, loader = read(training(numbered, order=order), 1), training(numbered, order=order)
    loader.set_epoch(1, seen=16)
    assert_equal([(batch.images, batch.labels) for batch in loader], whole[2:])
    loader.set_epoch(1)
    assert_equal([(batch.images, batch.labels) for batch in loader], whole)


@pytest.mark.parametrize(("processes", "batch"), [(1, 4), (2, 6), (3, 12)])
def test_other_processes_and_batches_see_what_is_left_of_an_epoch_once(
    numbered: Path, processes: int, batch: int
) -> None:
    first = [int(label) for _, labels in read(training(numbered), 1)[:2] for label in labels]
    left = []
    for rank in range(processes):
        loader = training(numbered, rank, processes, batch_size=batch)
        assert loader.pool == NUMBERED
        loader.set_epoch(1, seen=len(first))
        left += [int(label) for _, labels in loader for label in labels]
    seen = first + left
    assert len(seen) == len(set(seen)) == len(first) + (NUMBERED - len(first)) // batch * batch


def test_the_same_image_is_cropped_anew_in_each_epoch_and_by_each_seed(numbered: Path) -> None:
    loader, other = training(numbered), training(numbered, seed=4)
    one, two, three = by_label(read(loader, 0)), by_label(read(loader, 1)), by_label(read(other, 0))
    for alike in (two, three):
        common = one.keys() & alike.keys()
        assert len(common) > 30
        assert sum(torch.equal(one[label], alike[label]) for label in common) <= 1


@pytest.mark.parametrize("workers", [2, 5])
def test_the_number_of_workers_changes_nothing(numbered: Path, workers: int) -> None:
    assert_equal(read(training(numbered, workers=workers), 1), read(training(numbered, workers=1), 1))


@pytest.mark.parametrize("order", ["random", "pages"])
@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_processes_share_the_batches_of_one(numbered: Path, world_size: int, order: str) -> None:
    alone = read(training(numbered, order=order), 1)
    ranks = [read(training(numbered, rank, world_size, order=order), 1) for rank in range(world_size)]
    assert {len(rank) for rank in ranks} == {len(alone)}
    together = [
        (torch.cat([rank[k][0] for rank in ranks]), torch.cat([rank[k][1] for rank in ranks]))
        for k in range(len(alone))
    ]
    assert_equal(together, alone)


def test_no_image_is_seen_twice_in_an_epoch(numbered: Path) -> None:
    for world_size in (1, 3):
        labels = [
            int(label)
            for rank in range(world_size)
            for _, batch in read(training(numbered, rank, world_size, batch_size=9))
            for label in batch
        ]
        assert len(labels) == len(set(labels)) == NUMBERED // 9 * 9


@pytest.mark.parametrize("options", [{}, {"order": "pages"}, {"subset": 20, "world_size": 2}])
def test_batches_say_which_images_of_the_file_they_hold(numbered: Path, options: dict[str, Any]) -> None:
    """In this file the label of an image is its number."""
    loader = training(numbered, indices=True, **options)
    loader.set_epoch(1)
    batches = list(loader)
    assert len(batches) == len(loader)
    for batch in batches:
        images, labels = batch  # as any other
        assert isinstance(batch, IndexedBatch)
        assert batch.indices.dtype == torch.int64
        assert batch.indices.tolist() == labels.tolist()
        assert len(images) == len(labels)
    assert_equal([(batch.images, batch.labels) for batch in batches], read(training(numbered, **options), 1))


def test_flips(numbered: Path) -> None:
    whole: dict[str, Any] = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0)}  # never fits: the central fallback
    never, always, half = (by_label(read(training(numbered, flip=flip, **whole))) for flip in (0.0, 1.0, 0.5))
    assert all(torch.equal(never[label].flip(-1), always[label]) for label in never)
    flipped = sum(torch.equal(half[label], always[label]) for label in half)
    assert 0.25 * len(half) < flipped < 0.75 * len(half)


def test_the_order_by_pages_reads_everything_and_repeats(numbered: Path) -> None:
    loader = training(numbered, order="pages")
    one, two = read(loader, 0), read(loader, 1)
    assert len(one) == NUMBERED // 8
    assert_equal(read(training(numbered, order="pages"), 1), two)
    assert [labels.tolist() for _, labels in one] != [labels.tolist() for _, labels in two]
    # Which image is cropped how does not depend on the order it is read in.
    shuffled = by_label(read(training(numbered), 1))
    common = shuffled.keys() & by_label(two).keys()
    assert all(torch.equal(shuffled[label], by_label(two)[label]) for label in common)


@pytest.mark.parametrize("world_size", [1, 2, 3, 50])
@pytest.mark.parametrize("eval_batch_size", [7, 24, None])
def test_evaluation_sees_each_image_exactly_once(numbered: Path, world_size: int, eval_batch_size: int | None) -> None:
    labels: list[int] = []
    most = 0
    for rank in range(world_size):
        loader = evaluation(numbered, rank, world_size, eval_batch_size=eval_batch_size)
        epoch = read(loader)
        assert all(batch.ndim == 1 for _, batch in epoch)
        labels += [int(label) for _, batch in epoch for label in batch]
        assert len(epoch) == len(loader) <= loader.batches_everywhere
        assert loader.images == sum(len(batch) for _, batch in epoch)
        most = max(most, len(epoch))
        everywhere = loader.batches_everywhere
    assert sorted(labels) == list(range(NUMBERED))
    assert most == everywhere


def test_evaluation_does_not_depend_on_epoch_workers_or_processes(numbered: Path) -> None:
    loader = evaluation(numbered, workers=1)
    alone = read(loader)
    assert_equal(read(loader, 5), alone)
    ranks = [by_label(read(evaluation(numbered, rank, 3, workers=2))) for rank in range(3)]
    expected = by_label(alone)
    assert all(torch.equal(image, expected[label]) for rank in ranks for label, image in rank.items())


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_the_evaluation_crop_is_torchvisions(tmp_path: Path, interpolation: str) -> None:
    """Pixel by pixel, but for the step that Pillow rounds by between its passes; odd sizes, smaller and larger ones."""
    ensure_torchvision()
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

    draw = np.random.default_rng(0)
    rough = [Image.fromarray(make_image(draw, *sides)) for sides in ((60, 80), (91, 57), (33, 34), (15, 20))]
    images = [image.resize((3 * image.width + 1, 3 * image.height), Image.Resampling.BICUBIC) for image in rough]
    for image in images:
        out = tmp_path / f"{image.width}.beton"
        sample = Sample("x", np.asarray(image), 0)
        write_samples([sample], ["x"], out, Encoding(None, 90, 0.0, 0), source={}, progress=False)
        for side, share in ((112, 0.875), (64, 0.9), (61, 1.0)):
            options: dict[str, Any] = {
                "eval_resolution": side,
                "eval_crop_ratio": share,
                "interpolation": interpolation,
            }
            [(found, _)] = read(evaluation(out, num_classes=2, mean=(0, 0, 0), std=(1, 1, 1), **options))
            resize = Resize(math.floor(side / share), InterpolationMode(interpolation))
            expected = np.asarray(Compose([resize, CenterCrop(side)])(image)).astype(float)
            difference = np.abs((found[0].permute(1, 2, 0).numpy() * 255).round() - expected)
            assert difference.max() <= (1 if interpolation == "bilinear" else 4)
            assert difference.mean() < 0.3


def test_the_training_crop_is_torchvisions(tmp_path: Path) -> None:
    """The same box, cut out and resized."""
    ensure_torchvision()
    from torchvision.transforms.functional import hflip, resized_crop

    image = Image.fromarray(make_image(np.random.default_rng(0), 90, 70)).resize((280, 360), Image.Resampling.BICUBIC)
    out = tmp_path / "x.beton"
    write_samples(
        [Sample("x", np.asarray(image), 0)], ["x"], out, Encoding(None, 90, 0.0, 0), source={}, progress=False
    )
    plain: dict[str, Any] = {"mean": (0, 0, 0), "std": (1, 1, 1), "batch_size": 1, "resolution": 96, "flip": 0.5}
    loader = training(out, seed=0, **plain)
    sides = set()
    for epoch in range(20):
        [(found, _)] = read(loader, epoch)
        key = np.uint64(sample_key(0, epoch, 0))
        box = random_crop(key, 360, 280, 0.08, 1.0, 0.75, 4 / 3)
        mirrored = uniform(key, 0) < 0.5
        expected = resized_crop(image, *box, [96, 96])
        expected = np.asarray(hflip(expected) if mirrored else expected).astype(float)
        assert np.abs((found[0].permute(1, 2, 0).numpy() * 255).round() - expected).max() <= 1
        sides.add(mirrored)
    assert len(sides) == 2


def test_the_evaluation_crop_is_the_central_share_of_the_short_side(tmp_path: Path) -> None:
    image = make_image(np.random.default_rng(0), 60, 80)
    out = tmp_path / "x.beton"
    write_samples([Sample("x", image, 0)], ["x"], out, Encoding(None, 90, 0.0, 0), source={}, progress=False)
    plain: dict[str, Any] = {"mean": (0, 0, 0), "std": (1, 1, 1)}
    [(images, _)] = read(evaluation(out, num_classes=2, eval_resolution=30, eval_crop_ratio=0.5, **plain))
    np.testing.assert_array_equal((images[0] * 255).round().permute(1, 2, 0).numpy(), image[15:45, 25:55])


def test_batches_are_the_callers_to_keep(numbered: Path) -> None:
    loader = training(numbered)
    kept, copies = [], []
    for batch in loader:
        kept.append((batch.images, batch.labels))
        copies.append((batch.images.clone(), batch.labels.clone()))
    assert_equal(kept, copies)


def test_leaving_an_epoch_early_leaves_no_thread_behind(numbered: Path) -> None:
    for order in ("random", "pages"):
        loader = training(numbered, order=order, batch_size=2)
        for _ in loader:
            break
        gc.collect()
        assert not [thread for thread in threading.enumerate() if type(thread).__name__ == "Epoch"]
        expected = read(training(numbered, order=order, batch_size=2))
        assert_equal(read(loader), expected)


def test_a_second_iteration_ends_the_first(numbered: Path) -> None:
    loader = training(numbered, batch_size=2)
    first = iter(loader)
    next(first)
    second = iter(loader)
    next(second)
    assert sum(type(thread).__name__ == "Epoch" for thread in threading.enumerate()) == 1
    loader.close()
    assert not [thread for thread in threading.enumerate() if type(thread).__name__ == "Epoch"]


def test_two_loaders_at_once(numbered: Path) -> None:
    pairs = list(zip(training(numbered, workers=2), evaluation(numbered, workers=2), strict=False))
    assert_equal([(one.images, one.labels) for one, _ in pairs], read(training(numbered)))
    assert_equal([(two.images, two.labels) for _, two in pairs], read(evaluation(numbered))[: len(pairs)])


@pytest.mark.timeout(60)
def test_an_exception_in_the_loaders_thread_arrives(numbered: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ssam_scale.data.ffcv_loader import Epoch

    original = Epoch.run_pipeline

    def fail(self: Any, number: int, *rest: Any) -> Any:
        if number == 3:
            raise MemoryError("no memory left")
        return original(self, number, *rest)

    monkeypatch.setattr(Epoch, "run_pipeline", fail)
    batches = iter(training(numbered))
    for _ in range(3):
        next(batches)
    with pytest.raises(MemoryError, match="no memory left"):
        next(batches)
    assert not [thread for thread in threading.enumerate() if type(thread).__name__ == "Epoch"]


def test_torchs_threads_are_left_alone(numbered: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        for _ in training(numbered, workers=1):
            assert torch.get_num_threads() == before + 1
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def never(most: int) -> Workers:
    raise AssertionError("nothing is to be measured")


def test_cores_are_shared_among_the_processes_of_a_machine(numbered: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And of no more than a process's own is the number measured that it needs."""
    from ssam_scale.data import loaders as module

    monkeypatch.setattr(module, "usable_cores", lambda: 8)
    data = config(numbered)
    for local, world_size, expected in ((None, 1, 8), ("4", 8, 2), ("16", 16, 1), ("4", 1, 8)):
        for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
            monkeypatch.delenv(name, raising=False)
        if local:
            monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
        assert module._workers(data, world_size, never).count == expected
        assert module._workers(config(numbered, workers="auto"), world_size, Workers).count == expected
    assert module._workers(config(numbered, workers=3), 1, never).count == 3


@pytest.mark.parametrize("order", ["random", "pages"])
@pytest.mark.parametrize("processes", [1, 54])
def test_too_few_images(numbered: Path, processes: int, order: str) -> None:
    with pytest.raises(UserError, match=r"53 images are fewer than one batch of 54.*lower data\.batch_size"):
        training(numbered, 0, processes, batch_size=54, order=order)


def test_more_processes_than_pages(numbered: Path) -> None:
    """They share the pages, which is no mistake: the file has as many pages as it has."""
    pages = len(np.unique(inspect(numbered).pages))
    assert pages < 12
    ranks = [read(training(numbered, rank, 12, batch_size=12, order="pages")) for rank in range(12)]
    labels = [int(label) for rank in ranks for _, found in rank for label in found]
    assert len(labels) == len(set(labels)) == 48


def test_a_label_outside_the_models_classes(numbered: Path) -> None:
    with pytest.raises(UserError, match=r"data\.val .*label 10 is outside the model's 10 classes.*num_classes to 53"):
        evaluation(numbered, num_classes=10)


def test_train_and_validation_of_different_classes(numbered: Path, tmp_path: Path) -> None:
    image = make_image(np.random.default_rng(0), 9, 9)
    other = tmp_path / "other.beton"
    write_samples([Sample("x", image, 0)], ["cat", "dog"], other, Encoding(None, 90, 0.0, 0), source={}, progress=False)
    with pytest.raises(UserError, match=r"different classes \(only one has 0, 1, 10\).*--classes-of"):
        training(numbered, val=other)
    turned = tmp_path / "turned.beton"
    write_samples(
        [Sample("x", image, 0)], ["dog", "cat"], turned, Encoding(None, 90, 0.0, 0), source={}, progress=False
    )
    for loader in (training, evaluation):
        with pytest.raises(UserError, match=r"the same classes in another order.*--class-order"):
            loader(other, train=other, val=turned, batch_size=1)


@pytest.mark.slow
def test_hundreds_of_epochs_leave_nothing_behind(numbered: Path) -> None:
    loader = training(numbered, workers=2)
    read(loader)
    threads = threading.active_count()
    for epoch in range(300):
        for number, _ in enumerate(loader):
            if epoch % 3 == 0 and number == 1:
                break
    assert threading.active_count() <= threads


def test_a_subset_is_the_same_choice_in_every_run_and_on_every_process(numbered: Path) -> None:
    def seen(*ranks: ImageLoader) -> set[int]:
        return {int(label) for loader in ranks for _, labels in read(loader) for label in labels}

    chosen = seen(training(numbered, subset=16))
    assert len(chosen) == 16
    assert chosen == seen(training(numbered, subset=16, seed=9))
    assert chosen == seen(training(numbered, 0, 2, subset=16), training(numbered, 1, 2, subset=16))
    assert chosen != set(range(16))
    with pytest.raises(UserError, match=r"data\.subset 54: .* has 53 images"):
        training(numbered, subset=54)


def test_an_evaluation_needs_an_image_for_each_process(numbered: Path) -> None:
    with pytest.raises(UserError, match="53 images are fewer than one for each of 54 processes"):
        evaluation(numbered, 0, 54)

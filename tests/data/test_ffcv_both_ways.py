"""Files go both ways: what FFCV's writer wrote is read here, and what was written here FFCV's own loader reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from ffcv.fields import BytesField, FloatField, IntField, JSONField, NDArrayField, RGBImageField, TorchTensorField
from ffcv.fields.base import Field
from ffcv.fields.decoders import (
    CenterCropRGBImageDecoder,
    IntDecoder,
    RandomResizedCropRGBImageDecoder,
    SimpleRGBImageDecoder,
)
from ffcv.loader import Loader
from ffcv.transforms import ToTensor
from ffcv.writer import DatasetWriter

from ssam_scale.data import inspect, verify
from ssam_scale.data.check import add_checksums
from ssam_scale.data.encode import Encoding
from ssam_scale.data.write import Sample, write_samples
from ssam_scale.errors import UserError
from tests.support.images import make_image
from tests.support.loaders import NUMBERED, evaluation, training

Pixels = np.ndarray[Any, np.dtype[np.uint8]]

PAGE = 1 << 21
"""Bytes: FFCV's smallest, so that a file has several."""

FAST_DCT = 1.2
"""Levels of 255, the mean: FFCV has libjpeg's fast transform decode, which ours, exact, is not."""


def ffcv_writes(path: Path, fields: dict[str, Field], samples: Sequence[tuple[Any, ...]], workers: int = 1) -> Path:
    writer = DatasetWriter(str(path), fields, page_size=PAGE, num_workers=workers)
    writer.from_indexed_dataset(samples, chunksize=4)
    return path


def ours(path: Path, images: Sequence[Pixels], jpeg_proportion: float) -> Path:
    samples = [Sample(str(number), image, number) for number, image in enumerate(images)]
    encoding = Encoding(None, 90, jpeg_proportion, 0)
    write_samples(samples, [str(k) for k in range(len(images))], path, encoding, source={}, progress=False)
    return path


def by_label(path: Path, **values: Any) -> dict[int, torch.Tensor]:
    """What two epochs of training show of each image, and an evaluation."""
    found: dict[int, list[torch.Tensor]] = {}
    loader = training(path, batch_size=1, **values)
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        for images, labels in loader:
            found.setdefault(int(labels), []).append(images)
    for images, labels in evaluation(path):
        for image, label in zip(images, labels.tolist(), strict=True):
            found[label].append(image[None])
    return {label: torch.cat(images) for label, images in found.items()}


@pytest.fixture(scope="module")
def images() -> list[Pixels]:
    """Of many sizes, some of them so large that a page is full after three."""
    draw = np.random.default_rng(5)
    sides = [*draw.integers(20, 90, (NUMBERED - 6, 2)), *draw.integers(400, 500, (6, 2))]
    return [make_image(draw, int(height), int(width)) for height, width in sides]


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory, images: list[Pixels]) -> dict[int, torch.Tensor]:
    return by_label(ours(tmp_path_factory.mktemp("ours") / "raw.beton", images, 0.0))


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory, images: list[Pixels]) -> dict[int, torch.Tensor]:
    return by_label(ours(tmp_path_factory.mktemp("ours") / "jpeg.beton", images, 1.0))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "names", "workers"),
    [
        ({"write_mode": "raw"}, ("image", "label"), 1),
        ({"write_mode": "jpg"}, ("image", "label"), 2),
        ({"write_mode": "smart", "smart_threshold": 9_000}, ("covariate", "target"), 1),
        ({"write_mode": "proportion", "compress_probability": 0.4}, ("label", "image"), 1),
        ({"write_mode": "proportion"}, ("sixteen_letters_", "index"), 2),
    ],
    ids=["raw", "jpg", "smart", "proportion", "names"],
)
def test_what_ffcv_wrote_is_read_as_what_is_written_here(
    tmp_path: Path,
    images: list[Pixels],
    raw: dict[int, torch.Tensor],
    compressed: dict[int, torch.Tensor],
    options: dict[str, Any],
    names: tuple[str, str],
    workers: int,
) -> None:
    """Bit for bit, in training and evaluation: of raw images, and of JPEGs, which both compress alike."""
    image, label = names
    path = ffcv_writes(
        tmp_path / "x.beton",
        {image: RGBImageField(**options), label: IntField()},
        [(pixels, number) for number, pixels in enumerate(images)],
        workers,
    )
    beton = verify(path)
    assert beton.fields == names
    assert beton.labels.tolist() == list(range(NUMBERED))
    assert {"raw": beton.jpegs == 0, "jpg": beton.jpegs == NUMBERED}.get(
        options["write_mode"], 0 < beton.jpegs < NUMBERED
    )
    found = by_label(path)
    assert found.keys() == set(range(NUMBERED))
    for number, pixels in found.items():
        assert torch.equal(pixels, (compressed if beton.is_jpeg[number] else raw)[number])
    # In pages, with hashes and with the numbers of images, as any other.
    add_checksums(path)
    for number, pixels in by_label(path, order="pages").items():
        assert torch.equal(pixels, found[number])
    for batch in training(path, indices=True):
        assert batch.indices.tolist() == batch.labels.tolist()


def test_the_label_may_stand_before_the_image(
    tmp_path: Path, images: list[Pixels], raw: dict[int, torch.Tensor]
) -> None:
    samples = [(number, pixels) for number, pixels in enumerate(images)]
    path = ffcv_writes(tmp_path / "x.beton", {"y": IntField(), "x": RGBImageField()}, samples)
    assert inspect(path).fields == ("x", "y")
    found = by_label(path)
    assert all(torch.equal(found[number], raw[number]) for number in range(NUMBERED))
    for batch in training(path, indices=True):
        assert batch.indices.tolist() == batch.labels.tolist()


IMAGE = (RGBImageField(), np.zeros((8, 8, 3), np.uint8))
INT = (IntField(), 3)
OTHERS: dict[str, tuple[dict[str, tuple[Field, Any]], str]] = {
    "float label": (
        {"image": IMAGE, "label": (FloatField(), 0.5)},
        r"has no field of int labels: `image` \(RGB image\), `label` \(float\)",
    ),
    "no label": ({"image": IMAGE}, r"has no field of int labels: `image` \(RGB image\)"),
    "no image": ({"label": INT}, r"has no field of RGB images: `label` \(int\)"),
    "two images": (
        {"left": IMAGE, "right": IMAGE, "label": INT},
        r"has 2 fields of RGB images: `left` \(RGB image\), `right` \(RGB image\), `label` \(int\)",
    ),
    "two ints": (
        {"image": IMAGE, "label": INT, "index": INT},
        r"has 2 fields of ints, of which one is the label: .*`index` \(int\)",
    ),
    "16 bits": (
        {"image": (NDArrayField(np.dtype("int16"), (3, 8, 4)), np.zeros((3, 8, 4), np.int16)), "label": INT},
        r"has no field of RGB images: `image` \(array of int16 \[3, 8, 4\]\), `label` \(int\)",
    ),
    "tensor": (
        {"image": IMAGE, "label": INT, "mask": (TorchTensorField(torch.float32, (5,)), torch.zeros(5))},
        r"has other fields than an image and its label: .*`mask` \(tensor of float32 \[5\]\)",
    ),
    "labels in an array": (
        {"image": IMAGE, "labels": (NDArrayField(np.dtype("int64"), (4,)), np.zeros(4, np.int64))},
        r"has no field of int labels: .*`labels` \(array of int64 \[4\]\)",
    ),
    "JSON": ({"image": IMAGE, "label": INT, "meta": (JSONField(), {"a": 1})}, r"has other .*`meta` \(JSON\)"),
    "bytes": ({"image": IMAGE, "label": INT, "b": (BytesField(), np.zeros(9, np.uint8))}, r"has other .*`b` \(bytes\)"),
    "names cut short": (
        {"image_of_the_left_": IMAGE, "image_of_the_left_s_label": INT},
        r"two of its fields have one name \(FFCV keeps 16 characters\): `image_of_the_lef`",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", OTHERS)
def test_other_fields_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    fields, complaint = OTHERS[kind]
    path = ffcv_writes(
        tmp_path / "x.beton",
        {name: field for name, (field, _) in fields.items()},
        [tuple(value for _, value in fields.values())] * 3,
    )
    for refuses in (inspect, training, evaluation):
        with pytest.raises(UserError, match=rf"x\.beton: {complaint}.*; write it again") as refusal:
            refuses(path)
        assert "\n" not in str(refusal.value)


class Custom(IntField):
    """A field that FFCV does not have, which it writes as one of the user's."""


def test_a_custom_field_is_refused_by_name(tmp_path: Path) -> None:
    path = ffcv_writes(tmp_path / "x.beton", {"image": IMAGE[0], "label": Custom()}, [(IMAGE[1], 3)])
    with pytest.raises(UserError, match=r"has no field of int labels: .*`label` \(custom field\)"):
        inspect(path)


def theirs(path: Path, decoder: Any) -> dict[int, Pixels]:
    """What FFCV's loader reads, with its own decoder."""
    pipelines = {"image": [decoder, ToTensor()], "label": [IntDecoder(), ToTensor()]}
    found = {}
    for images, labels in Loader(str(path), 4, num_workers=1, pipelines=pipelines, drop_last=False):
        for image, label in zip(images.numpy().copy(), labels[:, 0].tolist(), strict=True):
            found[label] = image
    return found


def in_levels(path: Path, side: int) -> dict[int, Pixels]:
    """Whole square images, as they are decoded here."""
    loader = evaluation(path, eval_resolution=side, eval_crop_ratio=1.0, mean=(0, 0, 0), std=(1, 1, 1))
    found = {}
    for images, labels in loader:
        for image, label in zip(images, labels.tolist(), strict=True):
            found[label] = (image * 255).round().permute(1, 2, 0).numpy().astype(np.uint8)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "decoder",
    [
        SimpleRGBImageDecoder(),
        CenterCropRGBImageDecoder((48, 48), 1.0),
        RandomResizedCropRGBImageDecoder((48, 48), scale=(1.0, 1.0), ratio=(1.0, 1.0)),
    ],
    ids=["simple", "centre crop", "random resized crop"],
)
def test_ffcvs_decoders_read_what_is_written_here(tmp_path: Path, decoder: Any) -> None:
    draw = np.random.default_rng(6)
    images = [make_image(draw, 48, 48) for _ in range(14)]
    path = ours(tmp_path / "x.beton", images, 0.5)
    exact = in_levels(path, 48)
    is_jpeg, found = inspect(path).is_jpeg, theirs(path, decoder)
    assert 0 < is_jpeg.sum() < len(images)
    assert found.keys() == set(range(len(images)))
    for number, image in enumerate(images):
        if is_jpeg[number]:
            assert np.abs(found[number].astype(int) - exact[number]).mean() <= FAST_DCT
        else:
            np.testing.assert_array_equal(found[number], image)


@pytest.mark.slow
def test_ffcvs_centre_crop_of_images_of_many_sizes(tmp_path: Path, images: list[Pixels]) -> None:
    """As OpenCV's area interpolation, which it is, makes of the pixels that were written."""
    path = ours(tmp_path / "x.beton", images, 0.0)
    found = theirs(path, CenterCropRGBImageDecoder((32, 32), 0.9))
    for number, image in enumerate(images):
        height, width = image.shape[:2]
        side = int(0.9 * min(height, width))
        top, left = (height - side) // 2, (width - side) // 2
        box = np.ascontiguousarray(image[top : top + side, left : left + side])
        expected = cv2.resize(box, (32, 32), interpolation=cv2.INTER_AREA)
        np.testing.assert_array_equal(found[number], expected)

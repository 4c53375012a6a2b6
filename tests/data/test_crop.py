"""What is decoded of a JPEG for a crop is, pixel for pixel, what all of it would be."""

from __future__ import annotations

import ctypes
import io
import random
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from ssam_scale.data import augment, crop, inspect, resize
from ssam_scale.data.encode import Encoding, _decode_jpeg
from ssam_scale.data.ffcv_import import lib
from ssam_scale.data.sources import Sample
from ssam_scale.data.write import write_samples

DECODED, DAMAGED, NOT_DONE_HERE = 0, 1, 2
IMAGES = 400

pytestmark = pytest.mark.skipif(crop.library() is None, reason="no C compiler, or no libjpeg-turbo with its header")


class Decoder:
    """Of `crop.c`, called by itself."""

    def __init__(self) -> None:
        self._library = crop.library()
        assert self._library is not None
        self._decoder = ctypes.c_void_p(self._library.ssam_scale_crop_new())

    def __call__(self, data: bytes, size: tuple[int, int], box: tuple[int, int, int, int]) -> NDArray[np.uint8] | int:
        """The pixels of a box (top, left, rows, columns), or why there are none."""
        assert self._library is not None
        (height, width), (_, _, rows, columns) = size, box
        out, place = np.full(3 * rows * width + 64, 77, np.uint8), np.zeros(2, np.int32)
        pointers = (ctypes.c_void_p(each.ctypes.data) for each in (out, place))
        code = self._library.ssam_scale_crop_decode(
            self._decoder, data, ctypes.c_uint64(len(data)), height, width, *box, *pointers
        )
        if code != DECODED:
            return int(code)
        assert (out[3 * rows * width :] == 77).all()  # nothing is written behind what was asked for
        first, stride = place
        return out[: 3 * rows * stride].reshape(rows, stride, 3)[:, first : first + columns]


def picture(draw: random.Random, height: int, width: int) -> Image.Image:
    """With detail of all sizes, and colours that the chroma's interpolation matters for."""
    rough = np.random.default_rng(draw.randrange(2**32)).integers(
        0, 256, (height // 5 + 1, width // 5 + 1, 3), np.uint8
    )
    return Image.fromarray(rough).resize((width, height), Image.Resampling.BICUBIC)


def encoded(draw: random.Random, image: Image.Image) -> bytes:
    """By Pillow or OpenCV, with any of their chroma subsamplings, restart markers or not, in grey or in colour."""
    quality, restarts = draw.randint(20, 100), draw.random() < 0.3
    if draw.random() < 0.4:
        factors = draw.choice([0x221111, 0x211111, 0x121111, 0x111111])
        flags = [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, factors]
        done, data = cv2.imencode(".jpg", np.asarray(image)[..., ::-1], flags)
        assert done
        return bytes(data.tobytes())
    file, options = io.BytesIO(), {"restart_marker_rows": 1} if restarts else {}
    image = image.convert("L") if draw.random() < 0.2 else image
    image.save(file, "JPEG", quality=quality, subsampling=draw.choice([0, 1, 2]), **options)  # type: ignore[arg-type]
    return file.getvalue()


def test_any_box_of_any_jpeg() -> None:
    """Edges of all kinds: odd sizes, one pixel, boxes at every border."""
    draw, decode = random.Random(0), Decoder()
    for _ in range(IMAGES):
        height, width = draw.randint(1, 150), draw.randint(1, 150)
        data = encoded(draw, picture(draw, height, width))
        whole, complaint = _decode_jpeg(data, height, width)
        assert not complaint
        for _ in range(4):
            rows, columns = draw.randint(1, height), draw.randint(1, width)
            top, left = draw.randint(0, height - rows), draw.randint(0, width - columns)
            found = decode(data, (height, width), (top, left, rows, columns))
            assert np.array_equal(found, whole[top : top + rows, left : left + columns]), (height, width, top, left)


def test_what_has_to_be_decoded_as_a_whole_is_not_done_here() -> None:
    draw, decode = random.Random(1), Decoder()
    image = picture(draw, 40, 60)
    for mode, options in (("RGB", {"progressive": True}), ("CMYK", {}), ("RGB", {"keep_rgb": True})):
        file = io.BytesIO()
        image.convert(mode).save(file, "JPEG", **options)
        assert decode(file.getvalue(), (40, 60), (3, 4, 10, 10)) == NOT_DONE_HERE
    _, odd = cv2.imencode(".jpg", np.asarray(image), [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, 0x411111])
    assert decode(bytes(odd.tobytes()), (40, 60), (3, 4, 10, 10)) == NOT_DONE_HERE


def test_damage_is_said_and_the_decoder_goes_on() -> None:
    draw, decode = random.Random(2), Decoder()
    image = picture(draw, 64, 80)
    data = encoded(draw, image)
    box = 30, 20, 34, 50
    for damaged in (
        b"",
        b"\xff\xd8",
        data[: len(data) // 2],
        data[:300],
        bytes(1000),
        data[:400] + bytes(300) + data[700:],
    ):
        assert decode(damaged, (64, 80), box) == DAMAGED
        assert isinstance(decode(data, (64, 80), box), np.ndarray)
    for size in ((65, 80), (64, 79), (80, 64)):
        assert decode(data, size, (0, 0, 1, 1)) == DAMAGED


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEGs of all kinds as a .beton file, raw images among them."""
    folder, draw = tmp_path_factory.mktemp("photographs"), random.Random(3)
    samples = []
    for number in range(60):
        file = folder / f"{number}.jpg"
        file.write_bytes(encoded(draw, picture(draw, draw.randint(30, 300), draw.randint(30, 300))))
        samples.append(Sample(str(file), file, number % 2))
    write_samples(samples, ["a", "b"], folder / "x.beton", Encoding(None, 90, 0.8, 0), source={}, progress=False)
    return folder / "x.beton"


@pytest.mark.parametrize("training", [True, False])
def test_batches_are_the_same_with_what_is_compiled_from_c_and_without(photographs: Path, training: bool) -> None:
    augment.bind(lib, crop.library(), resize.library())
    beton, data = inspect(photographs), np.fromfile(photographs, np.uint8)
    images = np.arange(beton.images)

    def decoded(epoch: int, interpolation: int, compiled: bool) -> NDArray[np.uint8]:
        out, bad = np.zeros((len(images), 48, 48, 3), np.uint8), np.zeros(len(images), np.bool_)
        arguments: list[Any] = [data, beton.starts, beton.sizes, beton.is_jpeg, beton.heights, beton.widths, images]
        arguments += [training, 7, epoch, (0.08, 1.0, 0.75, 1.33), 0.5, 0.875, interpolation, compiled, compiled]
        augment.decode(*arguments, beton.sums, out, bad)
        assert not bad.any()
        return out

    for epoch in range(4):
        for code in range(len(resize.INTERPOLATIONS)):
            assert np.array_equal(decoded(epoch, code, True), decoded(epoch, code, False))
    assert not np.array_equal(decoded(0, 0, True), decoded(1, 0, True)) or not training
    assert not np.array_equal(decoded(0, 0, True), decoded(0, 1, True))


def test_without_a_compiler_there_is_no_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for compiler in ("false", str(tmp_path / "none"), "cc -include no_such_header.h"):
        monkeypatch.setenv("CC", compiler)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        assert crop.library.__wrapped__() is None
    assert not list((tmp_path / "cache/ssam_scale").iterdir())


def test_it_is_compiled_once_for_all_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert crop.library.__wrapped__() is not None
    (kept,) = (tmp_path / "ssam_scale").iterdir()
    monkeypatch.setenv("PATH", "")  # no compiler any more
    assert crop.library.__wrapped__() is not None
    assert kept.exists()


def test_a_cache_that_cannot_be_written_is_done_without(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert crop.library.__wrapped__() is not None

"""Of a damaged JPEG no pixel is written; what stands around the pixels is nobody's business."""

from __future__ import annotations

import io
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssam_scale.data.encode import BadImageError, Encoding, encode
from tests.support.images import make_image

PLAIN = Encoding(None, 90, 1.0, 0)
TRIES = 60


def jpeg(mode: str = "RGB", **options: object) -> bytes:
    image = Image.fromarray(make_image(np.random.default_rng(0), 96, 128)).convert(mode)
    file = io.BytesIO()
    image.save(file, options.pop("format", "JPEG"), quality=90, **options)  # type: ignore[arg-type]
    return file.getvalue()


def mpo() -> bytes:
    """Two pictures in one file, of which the first is the image."""
    pictures = [Image.fromarray(make_image(np.random.default_rng(n), 96, 128)) for n in range(2)]
    file = io.BytesIO()
    pictures[0].save(file, "MPO", save_all=True, append_images=pictures[1:], quality=90)
    return file.getvalue()


def codes(data: bytes) -> tuple[int, int]:
    """Where the first scan's stream of codes begins and ends."""
    start = data.index(b"\xff\xda")
    start += 2 + int.from_bytes(data[start + 2 : start + 4], "big")
    end = start
    while data[end] != 0xFF or data[end + 1] == 0:
        end += 1
    return start, end


def written(path: Path, data: bytes) -> bytes:
    path.write_bytes(data)
    return encode(path, 0, PLAIN).data


@pytest.mark.parametrize(
    "make", [jpeg, lambda: jpeg("CMYK"), mpo, lambda: jpeg(progressive=True)], ids=["RGB", "CMYK", "MPO", "progressive"]
)
def test_a_stream_of_codes_that_ends_early_or_late_is_refused(make: object, tmp_path: Path) -> None:
    """Bits of it are flipped: whatever libjpeg notices of that is a reason, stray bytes among them."""
    data, draw, refused = make(), random.Random(0), set()  # type: ignore[operator]
    assert written(tmp_path / "x.jpg", data)
    start, end = codes(data)
    for _ in range(TRIES):
        changed = bytearray(data)
        for _ in range(4):
            changed[draw.randrange(start, end)] ^= 1 << draw.randrange(8)
        try:
            written(tmp_path / "x.jpg", bytes(changed))
        except BadImageError as error:
            refused.add(str(error).partition(":")[0])
    assert "Corrupt JPEG data" in refused
    # Less than what should be there, and more.
    for damaged in (data[:start] + data[start + 40 : end] + data[end:], data[: (start + end) // 2]):
        with pytest.raises(BadImageError):
            written(tmp_path / "x.jpg", damaged)


def test_stray_bytes_before_the_end_of_the_image_mean_that_codes_are_missing(tmp_path: Path) -> None:
    data = jpeg()
    _, end = codes(data)
    with pytest.raises(BadImageError, match="extraneous bytes before marker 0xd9"):
        written(tmp_path / "x.jpg", data[:end] + b"\x00\x11\x22\x33" * 4 + data[end:])


def test_what_stands_around_the_pixels_is_welcome(tmp_path: Path) -> None:
    """Behind the image's end, and between the segments of its header, which are then left out."""
    data = jpeg()
    assert written(tmp_path / "x.jpg", data) == data
    assert written(tmp_path / "x.jpg", data + b"any bytes at all") == data + b"any bytes at all"
    table = data.index(b"\xff\xdb")
    stray = written(tmp_path / "x.jpg", data[:table] + b"\x01\x02\x03" + data[table:])
    assert np.abs(pixels(stray).astype(int) - pixels(data)).mean() < 2.0  # it was compressed anew


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))

"""Image files that are not what one expects, and what becomes of each when it is written."""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ssam_scale.data.scans import _MARKER
from tests.support.images import make_image

HEIGHT, WIDTH = 40, 56
PICTURE = make_image(np.random.default_rng(0), HEIGHT, WIDTH)
OTHER = make_image(np.random.default_rng(1), HEIGHT, WIDTH)
GRAY = PICTURE[:, :, 0]


@dataclass(frozen=True)
class Odd:
    """A file, and its outcome.

    Attributes:
        what: it is, for the table.
        suffix: of its name.
        content: its bytes.
        says: how it is counted, or words of the reason why it is refused.
        reads: what its pixels are to be: as Pillow has them, these [height, width, 3]; None: it is refused.
        kept: whether it can be stored with its own bytes.
        turned: whether EXIF says that it is shown turned.
    """

    what: str
    suffix: str
    content: bytes
    says: str
    reads: Literal["Pillow"] | NDArray[np.uint8] | None = "Pillow"
    kept: bool = False
    turned: bool = False

    def row(self) -> str:
        """Its line of the table in docs/writing.md."""
        if self.reads is None:
            return f"| {self.what} | refused: … {self.says} … |"
        how = "kept byte for byte" if self.kept else "as Pillow reads it" if isinstance(self.reads, str) else "read"
        return f"| {self.what} | {how}; counted as {self.says} |"


def save(image: Image.Image, kind: str, **options: Any) -> bytes:
    made = io.BytesIO()
    image.save(made, kind, **options)
    return made.getvalue()


def picture(mode: str = "RGB") -> Image.Image:
    return Image.fromarray(PICTURE).convert(mode)


def repeated(gray: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.repeat(gray[:, :, None], 3, axis=2)


def scans(data: bytes, count: int) -> bytes:
    """The beginning of a JPEG, to the end of so many scans."""
    place = 2
    while (found := _MARKER.search(data, place)) is not None:
        code, place = data[found.end() - 1], found.end()
        if count == 0:
            return data[: found.start()]
        if code not in (0xD8, 0xD9):
            place += int.from_bytes(data[place : place + 2], "big")
        count -= code == 0xDA
    return data


def without_segment(data: bytes, code: int) -> bytes:
    at = data.index(bytes((0xFF, code)))
    return data[:at] + data[at + 2 + int.from_bytes(data[at + 2 : at + 4], "big") :]


def as_ycck(data: bytes) -> bytes:
    at = data.index(b"Adobe")
    return data[: at + 11] + b"\x02" + data[at + 12 :]


def with_exif(orientation: int = 6, broken: bool = False) -> bytes:
    exif = Image.Exif()
    exif[0x112] = orientation
    data = save(picture(), "JPEG", quality=95, exif=exif)
    at = data.index(b"Exif\0\0") + 6
    return data[: at + 4] + b"\xff\xff\xff\x7f" + data[at + 8 :] if broken else data


def wide_tiff(values: NDArray[Any], white_is_zero: bool = False, big_endian: bool = False) -> bytes:
    """A TIFF of one strip, uncompressed: numbers of any type."""
    order = ">" if big_endian else "<"
    body = values.astype(values.dtype.newbyteorder(order)).tobytes()
    sample = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    tags = [
        (256, 4, values.shape[1]),
        (257, 4, values.shape[0]),
        (258, 3, values.dtype.itemsize * 8),
        (259, 3, 1),
        (262, 3, 0 if white_is_zero else 1),
        (273, 4, 8),
        (277, 3, 1),
        (278, 4, values.shape[0]),
        (279, 4, len(body)),
        (339, 3, sample),
    ]
    directory = struct.pack(order + "H", len(tags))
    for tag, kind, value in tags:
        directory += struct.pack(order + "HHI", tag, kind, 1)
        directory += struct.pack(order + ("I" if kind == 4 else "HH"), *((value,) if kind == 4 else (value, 0)))
    head = (b"MM" if big_endian else b"II") + struct.pack(order + "HI", 42, 8 + len(body))
    return head + body + directory + bytes(4)


def png_of(width: int, height: int) -> bytes:
    """The beginning of a PNG that says it is so large."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))


def _jpegs() -> list[Odd]:
    plain = save(picture(), "JPEG", quality=95)
    progressive = save(picture(), "JPEG", quality=95, progressive=True)
    cmyk = save(picture("CMYK"), "JPEG", quality=95)
    precise = plain.replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc0\x00\x11\x0c")
    mpo = save(picture(), "MPO", save_all=True, append_images=[Image.fromarray(OTHER)], quality=95)
    lacking = "scans are missing"
    return [
        Odd("JPEG", ".jpg", plain, "JPEG", kept=True),
        Odd("JPEG, gray", ".JPEG", save(picture("L"), "JPEG", quality=95), "JPEG, gray", kept=True),
        Odd("JPEG with bytes behind its end", ".jpg", plain + b"any bytes", "JPEG", kept=True),
        Odd("JPEG, progressive", ".jpg", progressive, "JPEG, progressive"),
        Odd(
            "JPEG, progressive, of which two scans are there",
            ".jpg",
            scans(progressive, 2) + b"\xff\xd9",
            lacking,
            None,
        ),
        Odd("JPEG, progressive, all scans but the last", ".jpg", scans(progressive, 9) + b"\xff\xd9", lacking, None),
        Odd("JPEG, cut off in its codes", ".jpg", plain[: len(plain) // 2], "premature end", None),
        Odd("JPEG, cut off in its header", ".jpg", plain[:100], "truncated file read", None),
        Odd("JPEG, of 12 bits", ".jpg", precise, "a JPEG that Pillow does not read", None),
        Odd("JPEG, CMYK with Adobe's marker", ".jpg", cmyk, "JPEG, CMYK"),
        Odd("JPEG, YCCK with Adobe's marker", ".jpg", as_ycck(cmyk), "JPEG, YCCK"),
        Odd("JPEG, CMYK without Adobe's marker", ".jpg", without_segment(cmyk, 0xEE), "without Adobe's marker", None),
        Odd("JPEG, CMYK, cut off", ".jpg", cmyk[: len(cmyk) // 2], "premature end", None),
        Odd("JPEG with an EXIF orientation", ".jpg", with_exif(), "JPEG", kept=True, turned=True),
        Odd("JPEG with EXIF that cannot be read", ".jpg", with_exif(broken=True), "JPEG", kept=True),
        Odd("MPO, two pictures as JPEGs", ".jpg", mpo, "MPO, its first picture"),
    ]


def _others() -> list[Odd]:
    frames = {"save_all": True, "append_images": [Image.fromarray(OTHER)]}
    palette = picture().quantize(64)
    wide = GRAY.astype(np.uint16) * 256 + 99
    pgm = b"P5 %d %d 65535\n" % (WIDTH, HEIGHT) + wide.astype(">u2").tobytes()
    png = save(picture(), "PNG")
    first = "its first picture"
    unknown = "whose range is not known"
    return [
        Odd("PNG", ".png", png, "PNG"),
        Odd("PNG under the name of a JPEG", ".JPEG", png, "PNG, named .jpeg"),
        Odd("PNG, cut off", ".png", png[: len(png) // 2], "truncated", None),
        Odd(
            "PNG, palette with transparency",
            ".png",
            save(palette, "PNG", transparency=3),
            "PNG, palette, without its transparency",
        ),
        Odd("PNG, RGBA", ".png", save(picture("RGBA"), "PNG"), "PNG, without its transparency"),
        Odd("PNG, black and white", ".png", save(picture("1"), "PNG"), "PNG, gray"),
        Odd("PNG, animated", ".png", save(picture(), "PNG", **frames), f"PNG, {first}"),
        Odd("PNG, gray of 16 bits", ".png", save(Image.fromarray(wide), "PNG"), "PNG, gray of 16 bits", repeated(GRAY)),
        Odd("PNG that says it has 400 megapixels", ".png", png_of(20000, 20000) + png[33:], "decompression bomb", None),
        Odd("PGM of 16 bits", ".pgm", pgm, "PPM, gray of 16 bits", repeated(GRAY)),
        Odd("TIFF, gray of 16 bits", ".tif", wide_tiff(wide), "TIFF, gray of 16 bits", repeated(GRAY)),
        Odd(
            "TIFF, gray of 16 bits, big-endian",
            ".tif",
            wide_tiff(wide, big_endian=True),
            "TIFF, gray of 16 bits",
            repeated(GRAY),
        ),
        Odd(
            "TIFF, gray of 16 bits, 0 is white",
            ".tif",
            wide_tiff(wide, True),
            "TIFF, gray of 16 bits",
            repeated(255 - GRAY),
        ),
        Odd("TIFF, integers of 32 bits", ".tif", wide_tiff(wide.astype(np.int32)), unknown, None),
        Odd("TIFF, signed integers of 16 bits", ".tif", wide_tiff(GRAY.astype(np.int16)), unknown, None),
        Odd("TIFF, floats from 0 to 1", ".tif", wide_tiff(GRAY.astype(np.float32) / 255), unknown, None),
        Odd("TIFF, two pages", ".tiff", save(picture(), "TIFF", **frames), f"TIFF, {first}"),
        Odd("WebP, animated", ".webp", save(picture(), "WEBP", lossless=True, **frames), f"WEBP, {first}"),
        Odd(
            "GIF, animated, under the name of a JPEG",
            ".jpg",
            save(picture(), "GIF", **frames),
            f"GIF, {first}, palette, named .jpg",
        ),
        Odd("HEIC under the name of a JPEG", ".jpg", b"\0\0\0\x18ftypheic" + bytes(99), "family of HEIC (heic)", None),
        Odd("nothing at all", ".jpg", b"", "empty file", None),
        Odd("text under the name of a JPEG", ".jpg", b"Hello.\n", "text, and not an image", None),
        Odd("a page of HTML", ".jpg", b"<!DOCTYPE html><html>404</html>", "a page of HTML", None),
        Odd(
            "a pointer of Git LFS", ".jpg", b"version https://git-lfs.github.com/spec/v1\n", "pointer of Git LFS", None
        ),
        Odd("random bytes", ".png", bytes(range(255, 0, -1)), "not an image that Pillow knows", None),
    ]


ODD = [*_jpegs(), *_others()]


def table() -> str:
    """The table in docs/writing.md."""
    return "\n".join(["| file | outcome |", "|---|---|", *(odd.row() for odd in ODD)])

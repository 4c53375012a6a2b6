"""The .beton format: its layout, checks of a file before it is read, and the sidecar that holds its checksum.

FFCV's format has neither a magic number nor a checksum, and FFCV reads a damaged file without a word. So every file is
checked here for consistency of header, tables and size, and against `<file>.json`, which the writer leaves beside it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ssam_scale.data.mapped import Mapped
from ssam_scale.data.read_ahead import Placed
from ssam_scale.data.xxh3 import xxh3
from ssam_scale.errors import UserError

PAGE_SIZE = 1 << 23
"""Bytes that are read at once by the quasi-random order, and the largest image that fits: FFCV's own default."""

JPEG, RAW = 0, 1
"""FFCV's codes of how an image is stored."""

LARGEST_SIDE = 65535
"""Pixels: of a JPEG, and of FFCV's table."""

_RGB_FIELD, _INT_FIELD = 2, 1
_ARRAY_FIELDS = (4, 6)
_KINDS = {0: "float", 1: "int", 2: "RGB image", 3: "bytes", 4: "array", 5: "JSON", 6: "tensor", 255: "custom field"}
"""FFCV's codes of what a field holds."""

_UNWRITTEN = "write it with `ssam-scale data write {0} FILE`, or read it as it is: folder:{0}"
_VERSION = 2
_FIELDS = ("image", "label")
_CHUNK = 1 << 24


@dataclass(frozen=True)
class Sidecar:
    """What `<file>.json` records about a .beton file."""

    images: int
    classes: list[str]
    file_bytes: int
    sha256: str
    recipe: dict[str, Any]
    """How the file was made: enough to tell whether making it again would give the same."""
    xxh3: str = ""
    """The hash of each image's bytes in the order of the file: uint64, little-endian, in base64; empty: not known."""

    @staticmethod
    def path(beton: Path) -> Path:
        """Where the sidecar of `beton` lies."""
        return beton.with_name(beton.name + ".json")

    @classmethod
    def load(cls, beton: Path) -> Sidecar | None:
        """Read the sidecar of `beton`; None where there is none. Raises UserError if it cannot be understood."""
        path = cls.path(beton)
        try:
            note = dict(json.loads(path.read_text(encoding="utf-8")))
            note.pop("xxh64", None)  # hashes that version 0.1's first files had
            return cls(**note)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise UserError(
                f"{path}: not a description of a .beton file ({error}); write {beton.name} again"
            ) from error

    def dump(self) -> bytes:
        """The file's content."""
        return (json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n").encode()


@dataclass(frozen=True)
class Beton:
    """A .beton file whose tables have been read and found consistent. `Images`.

    Attributes:
        path: of the file.
        bytes: of the file.
        page_size: bytes of a page.
        labels: int64 [images], the label of each image.
        heights: int64 [images], pixels.
        widths: int64 [images], pixels.
        is_jpeg: bool [images], stored as JPEG or as raw pixels.
        starts: int64 [images], where the bytes of each begin in the file.
        sizes: int64 [images], how many these are.
        sums: uint64 [images], `xxh3` of them, which decoding compares; or [0]: they are not known.
        sidecar: what lies beside the file, if anything does.
        fields: the names of the image's and the label's field.
    """

    path: Path
    bytes: int
    page_size: int
    labels: NDArray[np.int64]
    heights: NDArray[np.int64]
    widths: NDArray[np.int64]
    is_jpeg: NDArray[np.bool_]
    starts: NDArray[np.int64]
    sizes: NDArray[np.int64]
    sums: NDArray[np.uint64]
    sidecar: Sidecar | None
    fields: tuple[str, str] = _FIELDS

    @property
    def pixels(self) -> NDArray[np.int64]:
        """[images] height times width of each image."""
        return self.heights * self.widths

    @property
    def pages(self) -> NDArray[np.int64]:
        """[images] the page that each image lies in, counted from the file's beginning."""
        return self.starts // self.page_size

    @property
    def jpegs(self) -> int:
        """How many images are stored as JPEG."""
        return int(self.is_jpeg.sum())

    @property
    def parts(self) -> tuple[Beton]:
        """See `Images`."""
        return (self,)

    @property
    def images(self) -> int:
        """See `Images`."""
        return len(self.labels)

    @property
    def classes(self) -> int:
        """See `Images`."""
        return len(self.class_names) or int(self.labels.max(initial=-1)) + 1

    @property
    def place(self) -> str:
        """See `Images`."""
        return str(self.path)

    @property
    def class_names(self) -> list[str]:
        """See `Images`."""
        return [] if self.sidecar is None else self.sidecar.classes

    @property
    def counts(self) -> dict[str, int]:
        """See `Images`."""
        return {"JPEG": self.jpegs, "raw": self.images - self.jpegs}

    @property
    def fingerprint(self) -> str:
        """32 hexadecimal digits that another content changes: of the sidecar's checksum; without one, of the tables."""
        if self.sidecar is not None:
            return self.sidecar.sha256[:32]
        tables = hashlib.sha256(f"{self.bytes} {self.jpegs}".encode())
        for table in (self.labels, self.pixels):
            tables.update(table.tobytes())
        return tables.hexdigest()[:32]

    def named(self, image: int) -> str:
        """See `Images`."""
        return str(image)

    def complaint(self, image: int) -> str:
        """See `Images`."""
        return f"{self.path}: image {image} is damaged; copy or write the file again"

    @property
    def assurance(self) -> str:
        """See `Images`."""
        if self.sidecar is not None:
            return "whole: every byte as it was written"
        return (
            "tables consistent, and every image can be decoded; nothing beside it says what it was written as "
            "(--add-checksums notes what it is now)"
        )

    def check_content(self) -> None:
        """See `Images`."""
        if self.sidecar is not None and self.sidecar.sha256 and checksum(self.path) != self.sidecar.sha256:
            raise UserError(
                f"{self.path}: its content has changed since it was written (checksum); copy or write it again"
            )

    def reading(self) -> Mapped:
        """See `Images`."""
        return Mapped(self, [Placed(self.path, self.bytes, 0)])

    def table(self) -> AbstractContextManager[tuple[Path, tuple[str, str]]]:
        """Itself."""
        return nullcontext((self.path, self.fields))


def layout(*, label_first: bool = False) -> tuple[np.dtype[Any], np.dtype[Any], np.dtype[Any], np.dtype[Any]]:
    """Record types of header, field descriptor, one image's metadata (f0: image, f1: label) and allocation table.

    Args:
        label_first: of the metadata f0 is the label, and f1 the image.
    """
    from ssam_scale.data import ffcv_import as ffcv  # takes seconds, so not before it is needed

    fields = [ffcv.RGBImageField(), ffcv.IntField()]
    metadata = ffcv.get_metadata_type(fields[::-1] if label_first else fields)
    return ffcv.HeaderType, ffcv.FieldDescType, metadata, ffcv.ALLOC_TABLE_TYPE


@contextmanager
def table_of(labels: NDArray[np.int64]) -> Iterator[tuple[Path, tuple[str, str]]]:
    """A .beton file of labels without images, for FFCV's loader to take them from, and its fields; gone afterwards.

    Raises:
        UserError: there is no room for it.
    """
    header_type, field_type, meta_type, _ = layout()
    header, meta = np.zeros((), header_type), np.zeros(len(labels), meta_type)
    meta["f1"] = labels
    size = header.nbytes + 2 * field_type.itemsize + meta.nbytes
    header[()] = (_VERSION, 2, PAGE_SIZE, len(labels), size)
    try:
        with tempfile.NamedTemporaryFile(suffix=".beton") as file:
            file.write(header.tobytes() + _described(field_type).tobytes() + meta.tobytes())
            file.flush()
            yield Path(file.name), _FIELDS
    except OSError as error:
        raise UserError(f"{tempfile.gettempdir()}: no room for a table of {size:,} bytes ({error.strerror})") from error


def _described(field_type: np.dtype[Any]) -> NDArray[Any]:
    """Descriptors of an image and its label."""
    fields = np.zeros(len(_FIELDS), field_type)
    for record, kind, name in zip(fields, (_RGB_FIELD, _INT_FIELD), _FIELDS, strict=True):
        record["type_id"] = kind
        record["name"][: len(name)] = np.frombuffer(name.encode(), np.uint8)
    return fields


class Pages:
    """Lays images out in a new .beton file, in the order given, so that equal input gives an equal file.

    Args:
        file: an empty file, open for writing; OSError from it passes through.
        capacity: the largest number of images that will be appended.
    """

    def __init__(self, file: BinaryIO, capacity: int) -> None:
        header, field, meta, table = layout()
        self._file = file
        self._header = np.zeros((), header)
        self._fields = _described(field)
        self._meta = np.zeros(capacity, meta)
        self._table = np.zeros(capacity, table)
        self._count = 0
        self.sums: list[int] = []
        """`xxh3` of each image's bytes."""
        self._page = bytearray()
        tables = self._header.nbytes + self._fields.nbytes + self._meta.nbytes
        self.start = self._page_start = -(-tables // PAGE_SIZE) * PAGE_SIZE
        """Where the first image lies."""

    @property
    def end(self) -> int:
        """Bytes of the file so far."""
        return self._page_start + len(self._page)

    def append(self, mode: int, height: int, width: int, data: bytes, label: int) -> bool:
        """Add one image, stored as JPEG or RAW; `data` must not be longer than PAGE_SIZE.

        Returns:
            Whether the images before it have been written, which fill a page, and more of them do not fit.
        """
        is_full = len(self._page) + len(data) > PAGE_SIZE
        if is_full:
            self._flush()
        digest = xxh3(data)
        self._enter(mode, height, width, self._page_start + len(self._page), len(data), label, digest)
        self._page += data
        return is_full

    def resume(self, page: Sequence[tuple[int, int, int, int, int, int]]) -> None:
        """Go on behind a page that is in the file already, before anything is appended.

        Args:
            page: mode, height, width, bytes, label and hash of each image in it.
        """
        place = self._page_start
        for mode, height, width, size, label, digest in page:
            self._enter(mode, height, width, place, size, label, digest)
            place += size
        self._page_start += PAGE_SIZE

    def _enter(self, mode: int, height: int, width: int, place: int, size: int, label: int, digest: int) -> None:
        self._meta[self._count] = ((mode, width, height, place), label)
        self._table[self._count] = (self._count, place, size)
        self.sums.append(digest)
        self._count += 1

    def finish(self) -> None:
        """Write what is left, the tables and, last of all, the header that makes the file valid."""
        self._flush()
        self._file.seek(self._page_start)
        self._file.write(self._table[: self._count].tobytes())
        self._file.seek(self._header.nbytes)
        self._file.write(self._fields.tobytes())
        self._file.write(self._meta[: self._count].tobytes())
        self._header[()] = (2, len(self._fields), PAGE_SIZE, self._count, self._page_start)
        self._file.seek(0)
        self._file.write(self._header.tobytes())

    def _flush(self) -> None:
        if not self._page:
            return
        self._file.seek(self._page_start)
        self._file.write(self._page.ljust(PAGE_SIZE, b"\0"))
        self._page_start += PAGE_SIZE
        self._page = bytearray()


def inspect(path: Path) -> Beton:
    """Read the tables of a .beton file and check that they fit each other, the file's size and the sidecar.

    Reads a few dozen bytes per image, so it is cheap enough for every start. Damage inside images is found by decoding
    them, and by `check.verify`.

    Raises:
        UserError: no such file, not a .beton file, cut short, of other fields, or not the file the sidecar describes.
    """
    try:
        if path.is_dir():
            inside = ", ".join(str(file) for file in sorted(path.glob("*.beton"))[:3])
            hint = f"; did you mean {inside}?" if inside else f"; {_UNWRITTEN.format(path)}"
            raise UserError(f"{path}: is a folder, and a .beton file is needed{hint}")
        if not path.is_file():
            raise UserError(f"{path}: no such file; write it with `ssam-scale data write FOLDER {path}`")
        return _inspect(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error


def _inspect(path: Path) -> Beton:
    header_type, field_type, meta_type, table_type = layout()
    size = path.stat().st_size
    alien = UserError(f"{path}: not a .beton file; write one with `ssam-scale data write FOLDER OUT`")
    if size < header_type.itemsize:
        raise alien
    header = np.fromfile(path, header_type, 1)[0]
    page, images, table_at = int(header["page_size"]), int(header["num_samples"]), int(header["alloc_table_ptr"])
    if not 1 <= header["num_fields"] <= 64 or page < 1 << 21 or page & (page - 1):
        swapped = header.view(header_type.newbyteorder())
        if swapped["version"] == _VERSION and swapped["num_fields"] <= 64:
            raise UserError(
                f"{path}: its numbers have the other byte order, and FFCV's are little-endian; write it again"
            )
        raise alien
    if header["version"] != _VERSION:
        if table_at > size or header["version"] > 16:
            raise alien
        raise UserError(
            f"{path}: is of version {header['version']} of the .beton format; version {_VERSION} is read, FFCV 1's: "
            "write it again"
        )
    short = UserError(f"{path}: cut short or never finished ({size:,} bytes); copy or write it again")
    fields_end = header_type.itemsize + int(header["num_fields"]) * field_type.itemsize
    if size < fields_end or table_at == 0 or table_at > size:
        raise short
    fields = np.fromfile(path, field_type, int(header["num_fields"]), offset=header_type.itemsize)
    image_at, label_at = _places(path, fields)
    names = _names(fields)
    meta_type = layout(label_first=label_at < image_at)[2]
    if images * table_type.itemsize != size - table_at or fields_end + images * meta_type.itemsize > table_at:
        raise short
    meta = np.fromfile(path, meta_type, images, offset=fields_end)
    table = np.fromfile(path, table_type, images, offset=table_at)
    image, label = meta[f"f{image_at}"], meta[f"f{label_at}"]
    pixels = image["height"].astype(np.int64) * image["width"]
    length = np.zeros(images, np.int64)
    ids = np.minimum(table["sample_id"], max(images - 1, 0)).astype(np.int64)
    pointers = np.zeros(images, np.uint64)
    length[ids], pointers[ids] = table["size"], table["ptr"]
    raw = image["mode"] == RAW
    by_place = np.argsort(pointers)
    ends = (pointers + length.astype(np.uint64))[by_place]
    if (
        (pointers != image["data_ptr"]).any()
        or (pointers < fields_end).any()
        or (pointers.astype(np.float64) + length > table_at).any()
        or (pixels <= 0).any()
        or (length <= 0).any()
        or (raw & (length != 3 * pixels)).any()
        or (image["mode"] > RAW).any()
        or (ends[:-1] > pointers[by_place][1:]).any()  # two in one place
    ):
        raise UserError(f"{path}: its tables contradict each other, so it is damaged; copy or write it again")
    sidecar = Sidecar.load(path)
    if sidecar is not None and (sidecar.file_bytes, sidecar.images) != (size, images):
        raise UserError(
            f"{path}: {images:,} images in {size:,} bytes, but {Sidecar.path(path).name} describes {sidecar.images:,} "
            f"images in {sidecar.file_bytes:,} bytes; copy both again, or write the file again"
        )
    sums = np.zeros(0, np.uint64) if sidecar is None else decoded_sums(sidecar.xxh3)
    if len(sums) not in (0, images):
        raise UserError(f"{Sidecar.path(path)}: has {len(sums):,} hashes of {images:,} images; write {path.name} again")
    return Beton(
        path,
        size,
        page,
        labels=label.astype(np.int64),
        heights=image["height"].astype(np.int64),
        widths=image["width"].astype(np.int64),
        is_jpeg=~raw,
        starts=pointers.astype(np.int64),
        sizes=length,
        sums=sums,
        sidecar=sidecar,
        fields=(names[image_at], names[label_at]),
    )


def _names(fields: NDArray[Any]) -> list[str]:
    return [bytes(name).split(b"\0")[0].decode("ascii", "replace") for name in fields["name"]]


def _places(path: Path, fields: NDArray[Any]) -> tuple[int, int]:
    """Which of the fields is the image, and which its label.

    Raises:
        UserError: there are others than these two.
    """
    kinds, names = [int(kind) for kind in fields["type_id"]], _names(fields)
    if sorted(kinds) == sorted((_RGB_FIELD, _INT_FIELD)) and len(set(names)) == len(names):
        return kinds.index(_RGB_FIELD), kinds.index(_INT_FIELD)
    if len(set(names)) < len(names):
        why = "two of its fields have one name (FFCV keeps 16 characters)"
    elif (images := kinds.count(_RGB_FIELD)) != 1:
        why = "has no field of RGB images" if not images else f"has {images} fields of RGB images"
    elif (labels := kinds.count(_INT_FIELD)) != 1:
        why = "has no field of int labels" if not labels else f"has {labels} fields of ints, of which one is the label"
    else:
        why = "has other fields than an image and its label"
    held = ", ".join(f"`{name}` ({_kind(field)})" for name, field in zip(names, fields, strict=True))
    raise UserError(
        f"{path}: {why}: {held}; write it again with one RGBImageField and one IntField alone, or with "
        "`ssam-scale data write`"
    )


def _kind(field: Any) -> str:
    """What a field holds, in words."""
    code = int(field["type_id"])
    if code in _ARRAY_FIELDS:
        from ssam_scale.data import ffcv_import as ffcv

        with suppress(Exception):  # whatever stands in the place of its type
            array = ffcv.NDArrayField.from_binary(field["arguments"])
            return f"{_KINDS[code]} of {array.dtype} {[int(side) for side in array.shape]}"
    return _KINDS.get(code, f"kind {code}, which FFCV has not")


def encoded_sums(sums: NDArray[np.uint64] | Sequence[int]) -> str:
    """Hashes as `Sidecar.xxh3` has them."""
    return base64.b64encode(np.asarray(sums, "<u8").tobytes()).decode()


def decoded_sums(text: str) -> NDArray[np.uint64]:
    """What `encoded_sums` was given; of nothing, or of what it has not made, nothing.

    Raises:
        UserError: it is neither.
    """
    try:
        return np.frombuffer(base64.b64decode(text, validate=True), "<u8").astype(np.uint64)
    except ValueError as error:
        raise UserError(f"the hashes of images beside a .beton file cannot be read ({error})") from error


def checksum(path: Path, advance: Callable[[int], None] = lambda _: None) -> str:
    """SHA-256 of a file in hexadecimal, the same as `sha256sum`'s; `advance` is told the bytes of each piece read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_CHUNK):
            digest.update(piece)
            advance(len(piece))
    return digest.hexdigest()

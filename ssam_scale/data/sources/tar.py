"""Tars that are read where they lie: nothing is unpacked, and each image is one read of its bytes."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ssam_scale.data.progress import Advance
from ssam_scale.data.sources.base import printable
from ssam_scale.errors import UserError

_BLOCK = 512


@dataclass(frozen=True, slots=True)
class Slice:
    """Bytes of a file that are a file of their own.

    Attributes:
        path: of the file that holds it.
        member: its name in there.
        start: where its bytes begin.
        size: how many there are.
    """

    path: Path
    member: str
    start: int
    size: int

    @property
    def name(self) -> str:
        """The last part of its name."""
        return self.member.rpartition("/")[2]

    def read_bytes(self) -> bytes:
        """The content. Raises OSError."""
        with self.path.open("rb") as file:
            file.seek(self.start)
            data = file.read(self.size)
        if len(data) < self.size:
            raise OSError(f"{printable(self.path)} has become shorter")
        return data


def members(path: Path, within: Slice | None = None, advance: Advance = lambda _: None) -> Iterator[Slice]:
    """The files in a tar in their order, but those that begin with a dot, as Finder's shadows do.

    Args:
        path: of the tar.
        within: the tar is this part of the file.
        advance: told the bytes that are passed.

    Raises:
        UserError: it is no tar, compressed, cut short, or has links in the place of files.
    """
    start, size = (0, 0) if within is None else (within.start, within.size)
    shown = printable(path if within is None else path / within.member)
    try:
        with path.open("rb") as file:
            if within is None:
                size = os.fstat(file.fileno()).st_size
            file.seek(start)
            done = start
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
                    if end > start + size:
                        raise tarfile.ReadError("unexpected end of data")
                    if member.issym() or member.islnk() or member.issparse():
                        raise UserError(
                            f"{shown}: {printable(member.name)} is a link or has holes, and no file; unpack the tar"
                        )
                    if member.isreg() and not member.name.rpartition("/")[2].startswith("."):
                        yield Slice(path, member.name, member.offset_data, member.size)
                    advance(end - done)
                    done = end
                    tar.members = []  # type: ignore[attr-defined] # a million, which nobody asks for again
            _check_end(file, done, shown)
    except tarfile.TarError as error:
        raise UserError(f"{shown}: {_why_no_tar(path, str(error))}") from error
    except OSError as error:
        raise UserError(f"{shown}: cannot be read ({error.strerror or error})") from error


def _check_end(file: BinaryIO, end: int, shown: str) -> None:
    """A tar ends with blocks of zeros; one that was cut off between two files is in order for tarfile."""
    file.seek(end)
    if file.read(_BLOCK) != bytes(_BLOCK):
        raise UserError(f"{shown}: cut short (no end of archive); copy or download it again")


def _why_no_tar(path: Path, reason: str) -> str:
    with path.open("rb") as file:
        begin = file.read(6)
    compressed = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
    for magic, name in compressed.items():
        if begin.startswith(magic):
            return f"compressed by {name}, so that images cannot be read where they lie; uncompress it first"
    return f"no tar, or cut short or damaged ({reason}); copy or download it again"

"""A file that takes hours to write, and goes on where it was after whoever wrote it was killed.

It grows as `<file>.part`, by whole pages. After each page a line in `<file>.part.log` says which images it holds, with
the hash of each: that is all that a later writer needs to know, and it believes none of it that the bytes do not bear
out. So nothing has to be synchronised with the disk on the way, and a machine that lost its power loses pages, not the
file.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ssam_scale.data.beton import PAGE_SIZE, Pages
from ssam_scale.data.sources import Sample, state_of
from ssam_scale.data.xxh3 import xxh3
from ssam_scale.errors import UserError
from ssam_scale.folders import why_not_replaceable


@dataclass(frozen=True)
class Written:
    """An image that was seen by a writer: as it lies in the file, or why it does not."""

    number: int
    """Its place among all images to be written."""
    mode: int = 0
    height: int = 0
    width: int = 0
    size: int = 0
    sum: int = 0
    kind: str = ""
    """What its file was, in words."""
    turned: bool = False
    reason: str = ""
    """Why it was left out; empty: it was not."""
    state: str = ""
    """`state_of` what it was read from, before it was."""


class Part:
    """The part of a file that is there; made by `growing`.

    Attributes:
        path: `<file>.part`.
        file: that, open for reading and writing.
        seen: images whose fate is known from an earlier writer, after `resume`.
    """

    def __init__(self, out: Path, file: BinaryIO, identity: dict[str, Any]) -> None:
        self.path, self.log_path = part_of(out), log_of(out)
        self.file = file
        self.seen: list[Written] = []
        self._identity = identity
        self._log: BinaryIO | None = None
        self._pages = 0

    @property
    def worth_keeping(self) -> bool:
        """Whether a later writer would have anything of it."""
        return self._pages > 0

    def resume(self, pages: Pages, samples: Sequence[Sample], *, with_left_out: bool) -> int:
        """Take over the pages that are there, sound, and of images that are as they were; cut off the rest.

        Args:
            pages: of `file`, still empty.
            samples: all images to be written.
            with_left_out: take pages by whose writing images were left out, too.

        Returns:
            The first image that is still to be written, counted among `samples`.
        """
        begin, good = 0, 0
        with suppress(OSError):
            lines = self.log_path.read_bytes().splitlines(keepends=True)
            if lines and _parsed(lines[0]) == self._identity:
                good = len(lines[0])
                for line in lines[1:]:
                    images, following = _page(line)
                    left_out = any(image.reason for image in images)
                    if (left_out and not with_left_out) or not self._take(pages, images, samples):
                        break
                    begin, good = following, good + len(line)
        self.file.truncate(pages.end if self.worth_keeping else 0)
        self._log = _opened(self.log_path)
        self._log.truncate(good)
        self._log.seek(good)
        if not good:
            self._append(self._identity)
        return begin

    def note(self, images: Sequence[Written], following: int) -> None:
        """A page was written.

        Args:
            images: those in it, and those that were left out on the way.
            following: the first image that is not in it.
        """
        self.file.flush()
        self._append({"images": [astuple(image) for image in images], "next": following})
        self._pages += 1

    def close(self, *, keep: bool) -> None:
        """Close the log, and remove both files unless they are kept for a later writer."""
        if self._log is not None:
            self._log.close()
        if not keep:
            self.path.unlink(missing_ok=True)
            self.log_path.unlink(missing_ok=True)

    def _take(self, pages: Pages, images: Sequence[Written], samples: Sequence[Sample]) -> bool:
        if any(image.state != state_of(samples[image.number].source) for image in images):
            return False
        self.file.seek(pages.end)
        page = np.frombuffer(self.file.read(PAGE_SIZE), np.uint8)
        kept = [image for image in images if not image.reason]
        place = 0
        for image in kept:
            content = page[place : place + image.size]
            if len(content) < image.size or xxh3(content) != image.sum:
                return False
            place += image.size
        if len(page) < PAGE_SIZE or not kept:
            return False
        pages.resume(
            [
                (image.mode, image.height, image.width, image.size, samples[image.number].label, image.sum)
                for image in kept
            ]
        )
        self.seen += images
        self._pages += 1
        return True

    def _append(self, entry: dict[str, Any]) -> None:
        assert self._log is not None
        self._log.write(json.dumps(entry, separators=(",", ":")).encode() + b"\n")
        self._log.flush()


def part_of(out: Path) -> Path:
    """Where a file is until it is whole."""
    return out.with_name(f"{out.name}.part")


def log_of(out: Path) -> Path:
    """Where it is written down what of it is there."""
    return out.with_name(f"{out.name}.part.log")


@contextmanager
def growing(out: Path, identity: dict[str, Any]) -> Iterator[Part]:
    """The part of `out`, which takes its place at the end.

    It stays for a later writer where this one is interrupted, killed or given an image that it refuses. It goes where
    nothing of use is in it, and where the disk did not take it.

    Args:
        out: the file to be written.
        identity: what it is made of and how; the part of something else is begun anew.

    Raises:
        UserError: another process is writing it, or something else is in its place.
        OSError: it cannot be written.
    """
    for path in (part_of(out), log_of(out)):
        if (problem := why_not_replaceable(path)) is not None:
            raise UserError(f"{path}: {problem}")
    file = _locked(out)
    part = Part(out, file, json.loads(json.dumps(identity)))
    keep = False
    try:
        yield part
        file.flush()
        os.fsync(file.fileno())
        part.path.replace(out)
    except OSError:
        raise
    except BaseException:
        keep = part.worth_keeping
        raise
    finally:
        part.close(keep=keep)
        file.close()
    sync_folder(out.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder last; some network file systems cannot, where the file itself is safe."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _locked(out: Path) -> BinaryIO:
    """The part of a file, which nobody else has."""
    path = part_of(out)
    while True:
        file = _opened(path)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                file.close()
                raise UserError(
                    f"{path}: another process is writing {out.name}; wait for it, or give another name"
                ) from None
            # Some network file systems have no locks.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # whoever had it has just put it in its place


def _opened(path: Path) -> BinaryIO:
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666), "r+b")


def _parsed(line: bytes) -> Any:
    """A line of the log; None for one that was cut short or damaged."""
    if not line.endswith(b"\n"):
        return None
    try:
        return json.loads(line)
    except ValueError:
        return None


def _page(line: bytes) -> tuple[list[Written], int]:
    """The images of a page by its line, and the first that is not in it; none, where the line is damaged."""
    try:
        entry = _parsed(line)
        return [Written(*image) for image in entry["images"]], int(entry["next"])
    except (KeyError, TypeError, ValueError):
        return [], 0

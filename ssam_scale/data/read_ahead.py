"""Pages of a file read into the system's page cache before they are used, and given back when they are done with.

The images themselves are decoded from a mapping of the file. What is read here is read in one piece of a page (8 MiB as
FFCV's files are written), in the order in which it is needed, so that a file that is not in memory yet comes as fast
as its disk, or its server, gives it.
"""

from __future__ import annotations

import mmap
import os
import threading
from bisect import bisect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Placed:
    """A file, and where it begins in memory that files are mapped into, one behind another.

    Attributes:
        path: of the file.
        bytes: of the file.
        start: bytes of that memory before it; of several files, a multiple of the size of a page.
    """

    path: Path
    bytes: int
    start: int


@dataclass(frozen=True)
class Span:
    """A page, and where in a sequence of images it is used.

    Attributes:
        page: its number, counted from the beginning of the memory that files are mapped into.
        first: the place of the first image of it.
        last: the place of the last one.
    """

    page: int
    first: int
    last: int


def spans(pages: NDArray[np.int64], order: NDArray[np.int64]) -> list[Span]:
    """The pages that a sequence of images uses, the earliest first.

    Args:
        pages: of each image there is.
        order: the images, as they are used.
    """
    used = pages[order]
    every, first = np.unique(used, return_index=True)
    last = len(used) - 1 - np.unique(used[::-1], return_index=True)[1]
    by_first = np.argsort(first, kind="stable")
    return [Span(int(every[i]), int(first[i]), int(last[i])) for i in by_first]


def most_at_once(pages: Sequence[Span]) -> int:
    """How many pages are in use at the same time, at the most."""
    ends = np.sort([span.last for span in pages])
    return max((index + 1 - int(np.searchsorted(ends, span.first)) for index, span in enumerate(pages)), default=0)


class ReadAhead:
    """Reads the pages of one epoch ahead of their use, in a thread; `advance` says how far it is.

    At any time the pages that are in use and those read ahead are no more than `most`; where all files are to be kept
    (`most` is None), none is given back.

    Args:
        files: what is read, in the order in which they are mapped.
        mapping: what the images are decoded from: pages of it that are done with are given back.
        page_size: in bytes.
        pages: of the epoch, the earliest first.
        most: pages in memory.
    """

    def __init__(
        self, files: Sequence[Placed], mapping: mmap.mmap, page_size: int, pages: Sequence[Span], most: int | None
    ) -> None:
        self._files, self._starts = files, [file.start for file in files]
        self._mapping, self._size, self._pages, self._most = mapping, page_size, pages, most
        self._by_end = sorted(pages, key=lambda span: span.last)
        self._read = self._done = self._place = 0
        self._moved, self._stopped = threading.Condition(), False
        self._thread = threading.Thread(target=self._run, name="read ahead", daemon=True)
        self._thread.start()

    def advance(self, place: int) -> None:
        """The images before `place` are done with."""
        with self._moved:
            self._place = max(self._place, place)
            self._moved.notify()

    def stop(self) -> None:
        """End the thread; pages that it has read are given back, used or not."""
        with self._moved:
            self._stopped = True
            self._moved.notify()
        self._thread.join()
        self._give_back(all_of_them=True)

    def _run(self) -> None:
        buffer = memoryview(bytearray(self._size))
        try:
            while (span := self._next()) is not None:
                file, start, end = self._place_of(span.page)
                with _opened(file.path) as descriptor:
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)  # no more is read than is asked for
                    while start < end and not self._stopped:
                        got = os.preadv(descriptor, [buffer[: end - start]], start)
                        if not got:
                            return
                        start += got
        except OSError:
            return  # who decodes from it will say so

    def _next(self) -> Span | None:
        """The page to be read next, once there is room for it; None at the end."""
        with self._moved:
            while not self._stopped and self._read < len(self._pages):
                self._give_back()
                # One that is needed now is read in any case.
                needed = self._pages[self._read].first <= self._place
                if self._most is None or needed or self._read - self._done < self._most:
                    self._read += 1
                    return self._pages[self._read - 1]
                self._moved.wait()
            while not self._stopped and self._done < len(self._by_end):
                self._give_back()
                if self._done < len(self._by_end):
                    self._moved.wait()
        return None

    def _give_back(self, all_of_them: bool = False) -> None:
        while self._done < len(self._by_end) and (all_of_them or self._by_end[self._done].last < self._place):
            file, start, end = self._place_of(self._by_end[self._done].page)
            self._done += 1
            if self._most is not None and end > start:
                # What is mapped stays in memory otherwise.
                self._mapping.madvise(mmap.MADV_DONTNEED, file.start + start, end - start)
                with suppress(OSError), _opened(file.path) as descriptor:
                    os.posix_fadvise(descriptor, start, end - start, os.POSIX_FADV_DONTNEED)

    def _place_of(self, page: int) -> tuple[Placed, int, int]:
        """The file that a page is of, and where in it the page begins and ends."""
        file = self._files[bisect(self._starts, page * self._size) - 1]
        start = page * self._size - file.start
        return file, start, min(file.bytes, start + self._size)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """A file's descriptor, only for as long as it is used: of a thousand files a process may not have one each."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)

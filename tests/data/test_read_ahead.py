"""Pages come into memory before they are used, no more of them than are to be there, and leave it."""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ssam_scale.data import inspect
from ssam_scale.data.encode import Encoding
from ssam_scale.data.loaders import _check_memory
from ssam_scale.data.order import LANES, PageOrder, share
from ssam_scale.data.read_ahead import Placed, ReadAhead, Span, most_at_once, spans
from ssam_scale.data.sources import Sample
from ssam_scale.data.write import write_samples
from ssam_scale.errors import UserError
from tests.support.loaders import config, training
from tests.support.processes import wait_until

PAGE = 1 << 21  # the smallest that FFCV has
PAGES = 12

_libc = ctypes.CDLL(None, use_errno=True)


def in_memory(mapping: mmap.mmap, start: int, length: int) -> float:
    """The share of a piece of a mapped file that the system has in its page cache."""
    view = np.frombuffer(mapping, np.uint8)
    address = view.ctypes.data + start
    flags = (ctypes.c_ubyte * -(-length // mmap.PAGESIZE))()
    assert _libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(length), flags) == 0, os.strerror(ctypes.get_errno())
    return float(np.mean(np.frombuffer(flags, np.uint8) & 1))


@contextmanager
def mapped(path: Path) -> Iterator[mmap.mmap]:
    with path.open("rb") as file:
        yield mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)


def forget(path: Path) -> None:
    """Take a file out of the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.fixture
def cold(tmp_path: Path) -> Path:
    """A file of so many pages, not all of the last, that is not in memory."""
    path = tmp_path / "file"
    path.write_bytes(os.urandom(PAGES * PAGE - 5_000))
    forget(path)
    return path


def placed(*files: Path) -> list[Placed]:
    """Files of as many pages each, one behind another."""
    return [Placed(file, file.stat().st_size, PAGES * PAGE * place) for place, file in enumerate(files)]


def cached(mapping: mmap.mmap, size: int) -> list[int]:
    """The pages that are in memory, nearly all of each."""
    pieces = [(page, page * PAGE, min(PAGE, size - page * PAGE)) for page in range(-(-size // PAGE))]
    return [page for page, start, length in pieces if in_memory(mapping, start, length) > 0.9]


def test_pages_are_read_before_they_are_used_and_no_more_than_there_is_room_for(cold: Path) -> None:
    """Each is used by ten images, in an order that is not the file's."""
    order = [7, 2, 9, 11, 0, 4, 1, 3, 10, 5, 8, 6]
    uses = [Span(page, 10 * index, 10 * index + 9) for index, page in enumerate(order)]
    size = cold.stat().st_size
    with mapped(cold) as mapping:
        assert cached(mapping, size) == []
        ahead = ReadAhead(placed(cold), mapping, PAGE, uses, most=4)
        try:
            wait_until(lambda: cached(mapping, size) == sorted(order[:4]), 30, "four pages")
            for index in range(1, PAGES + 1):
                sum(mapping[page * PAGE] for page in order[index - 1 : index])  # it is used
                ahead.advance(10 * index)
                wanted = sorted(order[index : index + 4])
                wait_until(lambda wanted=wanted: cached(mapping, size) == wanted, 30, f"pages {wanted}")
        finally:
            ahead.stop()


def test_pages_of_several_files_are_numbered_one_behind_another(cold: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(os.urandom(2 * PAGE))
    forget(other)
    size = cold.stat().st_size
    files = placed(cold, other)
    uses = [Span(page, index, index) for index, page in enumerate((PAGES + 1, 3, PAGES, PAGES - 1))]
    with mapped(cold) as first, mapped(other) as second, mmap.mmap(-1, files[-1].start + 2 * PAGE) as mapping:
        ahead = ReadAhead(files, mapping, PAGE, uses, most=2)
        try:
            wait_until(lambda: (cached(first, size), cached(second, 2 * PAGE)) == ([3], [1]), 30, "the first two")
            ahead.advance(2)
            wait_until(lambda: (cached(first, size), cached(second, 2 * PAGE)) == ([11], [0]), 30, "the others")
        finally:
            ahead.stop()


def test_what_is_needed_now_is_read_though_there_is_no_room(cold: Path) -> None:
    uses = [Span(page, page, 100) for page in range(6)]  # all in use at once
    size = cold.stat().st_size
    with mapped(cold) as mapping:
        ahead = ReadAhead(placed(cold), mapping, PAGE, uses, most=2)
        try:
            wait_until(lambda: cached(mapping, size) == [0, 1], 30, "two pages")
            ahead.advance(4)
            wait_until(lambda: cached(mapping, size) == [0, 1, 2, 3, 4], 30, "those in use")
        finally:
            ahead.stop()


def test_where_there_is_room_for_all_of_the_file_it_stays(cold: Path) -> None:
    size = cold.stat().st_size
    with mapped(cold) as mapping:
        ahead = ReadAhead(placed(cold), mapping, PAGE, [Span(page, page, page) for page in range(PAGES)], most=None)
        try:
            wait_until(lambda: cached(mapping, size) == list(range(PAGES)), 30, "all pages")
            ahead.advance(PAGES)
        finally:
            ahead.stop()
        assert cached(mapping, size) == list(range(PAGES))


@pytest.mark.parametrize("place", [0, 5])
def test_it_ends_when_it_is_told_to(cold: Path, place: int) -> None:
    with mapped(cold) as mapping:
        ahead = ReadAhead(placed(cold), mapping, PAGE, [Span(page, page, page) for page in range(PAGES)], most=1)
        ahead.advance(place)
        ahead.stop()
        assert not ahead._thread.is_alive()


def test_a_file_that_becomes_shorter_is_nothing_to_it(cold: Path) -> None:
    """Who decodes from it says so."""
    with mapped(cold) as mapping:
        ahead = ReadAhead(placed(cold), mapping, PAGE, [Span(page, page, page) for page in range(PAGES)], most=1)
        os.truncate(cold, PAGE)
        ahead.advance(PAGES)
        ahead.stop()
        assert not ahead._thread.is_alive()


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """640 raw images of 230 KB, 35 to each page of 8 MiB."""
    path, draw = tmp_path_factory.mktemp("large") / "large.beton", np.random.default_rng(0)
    noise = draw.integers(0, 256, (280, 280, 3), dtype=np.uint8)
    samples = [Sample(str(index), np.roll(noise, index, axis=1), index % 10) for index in range(640)]
    write_samples(samples, [str(n) for n in range(10)], path, Encoding(None, 90, 0.0, 0), source={}, progress=False)
    return path


def loader_of(path: Path, rank: int = 0, processes: int = 1, **values: Any) -> Any:
    return training(path, rank, processes, order="pages", resolution=16, workers=1, indices=True, **values)


def test_a_process_touches_its_share_of_the_file_and_leaves_no_more_than_its_memory(large: Path) -> None:
    """With room for two pages a lane, of which a small file has fewer: pages are given back as they are done with."""
    beton = inspect(large)
    assert len(np.unique(beton.pages)) == 19
    forget(large)
    loader = loader_of(large, memory=1 / 1024)  # a page in use of each lane, and one read ahead
    loader.set_epoch(1)
    with mapped(large) as mapping:
        seen = [index for batch in loader for index in batch.indices.tolist()]
        assert sorted(seen) == list(range(640))
        start = int(beton.pages.min()) * beton.page_size
        left = in_memory(mapping, start, beton.bytes - start)
        assert left < 0.2  # the file's tables, and what the kernel reads around a fault
    forget(large)
    loader = loader_of(large)  # and where the file fits, it stays
    loader.set_epoch(1)
    assert sum(len(batch.indices) for batch in loader) == 640
    with mapped(large) as mapping:
        assert in_memory(mapping, start, beton.bytes - start) > 0.95


def test_leaving_an_epoch_early_ends_the_thread(large: Path) -> None:
    loader = loader_of(large, memory=1 / 1024)
    for _ in loader:
        break
    assert not [thread for thread in threading.enumerate() if thread.name == "read ahead"]


def test_a_file_system_without_mappings_is_named(large: Path) -> None:
    """Such as `/proc`, and some FUSE file systems."""
    elsewhere = replace(inspect(large), path=Path("/proc/self/status"))
    with pytest.raises(UserError, match=r"/proc/self/status: cannot be mapped into memory \(.*\); copy it to a"):
        elsewhere.reading()


def test_lanes_of_processes_use_other_pages() -> None:
    """Each of two processes reads half of the file, but for pages in which a lane ends."""
    pages = np.repeat(np.arange(1, 4 * LANES + 1), 10)
    order = PageOrder(np.arange(len(pages)), 0, pages, 2)
    used = [spans(pages, share(order, 0, 0, rank, 2, 128)) for rank in range(2)]
    own = [{span.page for span in of_rank} for of_rank in used]
    assert len(own[0] & own[1]) <= 2
    assert most_at_once(used[0]) <= 2 * 3 * LANES // 2


def test_more_memory_than_there_is(large: Path) -> None:
    """Of a file that is as large; of a smaller one no more is kept than all of it."""
    beton = inspect(large)
    with pytest.raises(UserError, match=r"data\.memory 10240: the processes of this machine would keep 10240\.0 GiB"):
        _check_memory(config(large, order="pages", memory=10_240.0), replace(beton, bytes=2**50), 1)
    _check_memory(config(large, order="pages", memory=10_240.0), beton, 1)
    _check_memory(config(large, memory=10_240.0), replace(beton, bytes=2**50), 1)


@pytest.mark.parametrize("order", ["random", "pages"])
def test_a_file_that_is_written_again_between_epochs_is_named(large: Path, tmp_path: Path, order: str) -> None:
    path = tmp_path / "copy.beton"
    shutil.copy2(large, path)
    loader = training(path, order=order, resolution=16)
    assert sum(len(batch.labels) for batch in loader) == 640
    os.utime(path, (1, 1))
    with pytest.raises(UserError, match=r"copy\.beton: has changed since the run began to read it"):
        next(iter(loader))

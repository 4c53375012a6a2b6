"""An epoch's order: every image once, the same batches however many processes there are, each reading its own pages."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from ssam_scale.data.order import LANES, Indices, Order, PageOrder, RandomOrder, distinct, share
from ssam_scale.data.read_ahead import most_at_once, spans

SEED = 7


def paged(images: int, per_page: int, window: int = 2, first_page: int = 1) -> PageOrder:
    """An order of a file whose pages hold so many images each."""
    return PageOrder(np.arange(images), SEED, first_page + np.arange(images) // per_page, window)


def batches_of(order: Order, epoch: int, seen: int, processes: int, together: int) -> NDArray[np.int64]:
    """[batches, processes, images of a process]."""
    batch = together // processes
    shares = [share(order, epoch, seen, rank, processes, batch).reshape(-1, batch) for rank in range(processes)]
    return np.stack(shares, axis=1)


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=120),
    window=st.integers(1, 5),
    epoch=st.integers(0, 3),
    chosen=st.floats(0.1, 1.0),
    again=st.lists(st.integers(0, 500), max_size=2),
)
def test_every_image_comes_once_in_each_epoch(
    sizes: list[int], window: int, epoch: int, chosen: float, again: list[int]
) -> None:
    """Whatever the pages hold, whichever images are read, and however often the rest was drawn anew."""
    pages = np.repeat(np.arange(len(sizes)), sizes)
    pool = np.sort(np.random.default_rng(1).permutation(len(pages))[: max(1, int(chosen * len(pages)))])
    order = PageOrder(pool, SEED, pages, window)
    before = order.whole(epoch)
    order.reshuffled = {epoch: [(min(first, len(pool)), number) for number, first in enumerate(again)]}
    whole = order.whole(epoch)
    assert np.array_equal(np.sort(whole), pool)
    assert np.array_equal(whole, order.whole(epoch))
    kept = min([min(first, len(pool)) for first in again], default=len(pool))
    assert np.array_equal(whole[:kept], before[:kept])


@pytest.mark.parametrize("order", [paged(9_000, 50), RandomOrder(np.arange(9_000), SEED)], ids=["pages", "random"])
def test_all_numbers_of_processes_see_the_same_batches(order: Order) -> None:
    for seen, together in ((0, 256), (512, 256), (768, 192), (96, 24)):
        alone = batches_of(order, 3, seen, 1, together)
        assert len(alone) == (9_000 - seen) // together
        for processes in (2, 4, 8, 3, 24):
            if together % processes == 0:
                shared = batches_of(order, 3, seen, processes, together)
                assert np.array_equal(shared.reshape(alone.shape), alone), (seen, together, processes)


@pytest.mark.parametrize("order", [paged(9_000, 50), RandomOrder(np.arange(9_000), SEED)], ids=["pages", "random"])
def test_a_start_in_the_middle_is_a_slice(order: Order) -> None:
    """Also with other processes and batches: what was not seen before comes once."""
    whole = batches_of(order, 1, 0, 4, 256)
    assert np.array_equal(batches_of(order, 1, 512, 4, 256), whole[2:])
    seen = whole[:2].reshape(-1)
    rest = batches_of(order, 1, 512, 2, 64).reshape(-1)
    assert len(np.intersect1d(seen, rest)) == 0
    assert len(np.unique(rest)) == len(rest) == (9_000 - 512) // 64 * 64


def test_pages_are_others_in_each_epoch_and_by_each_seed() -> None:
    order, other = paged(9_000, 50), paged(9_000, 50)
    other.seed = SEED + 1
    one, two, three = order.whole(0), order.whole(1), other.whole(0)
    for a, b in ((one, two), (one, three)):
        assert (a == b).mean() < 0.01
        # Nor are the images of a page with the same others.
        first_of_a, first_of_b = (set(order.pages[x[:256]].tolist()) for x in (a, b))
        assert len(first_of_a & first_of_b) < 0.9 * len(first_of_a)


@pytest.mark.parametrize("processes", [1, 2, 4, 8, 16])
def test_each_process_reads_its_own_pages_and_few_at_once(processes: int) -> None:
    """Of 2,560 pages; where a lane ends within a page, two processes have it."""
    per_page, window = 20, 4
    order = paged(2_560 * per_page, per_page, window)
    shares = [share(order, 2, 0, rank, processes, 256 // processes) for rank in range(processes)]
    used = [spans(order.pages, images) for images in shares]
    assert sum(map(len, used)) <= 2_560 + LANES
    lanes = LANES // processes
    for pages in used:
        # Where lanes' windows end at other places than their neighbours', two are in use.
        assert most_at_once(pages) <= 2 * lanes * (window + 1)
    means = np.mean([most_at_once(pages) for pages in used])
    assert means <= 1.5 * lanes * (window + 1)


def test_a_batch_of_a_file_in_class_order_is_of_nearly_as_many_classes_as_a_random_one() -> None:
    """1,000 classes of 130 images, 80 a page as ImageNet's are: the measure that the default window is chosen by."""
    labels = np.repeat(np.arange(1_000), 130)
    random = distinct(labels, RandomOrder(np.arange(len(labels)), SEED).whole(0), 256)
    by_window = [distinct(labels, paged(len(labels), 80, window).whole(0), 256) for window in (1, 2, 8)]
    assert by_window == sorted(by_window)
    assert by_window[0] < 2 * LANES  # as many pages, of a class or two
    assert by_window[-1] > 0.85 * random


def test_of_a_file_of_few_pages_it_is_a_shuffle_of_all() -> None:
    """The lanes are parts of pages then, and neighbours in the file are not neighbours in them."""
    order = paged(3_000, 1_500, window=1)
    whole = order.whole(0)
    neighbours = np.abs(np.diff(whole.reshape(-1)[: 3_000 // LANES * LANES].reshape(-1, LANES), axis=1))
    assert 500 < neighbours.mean() < 1_300  # 1,000 of a random order
    labels = np.repeat(np.arange(30), 100)
    assert distinct(labels, whole, 64) > 0.95 * distinct(labels, RandomOrder(np.arange(3_000), SEED).whole(0), 64)


def test_spans_are_from_the_first_to_the_last_use() -> None:
    pages = np.array([5, 5, 7, 7, 7, 9])
    found = spans(pages, np.array([2, 0, 3, 5, 1, 4]))
    assert [(span.page, span.first, span.last) for span in found] == [(7, 0, 5), (5, 1, 4), (9, 3, 3)]
    assert most_at_once(found) == 3
    assert most_at_once([]) == 0
    assert spans(pages, np.array([], dtype=np.int64)) == []


def brute_force(pages: Indices, order: Indices) -> int:
    places = {int(page): np.flatnonzero(pages[order] == page) for page in np.unique(pages[order])}
    return max(sum(found[0] <= place <= found[-1] for found in places.values()) for place in range(len(order)))


@given(st.lists(st.integers(0, 6), min_size=1, max_size=40))
def test_pages_in_use_are_counted_as_by_looking_at_every_place(pages: list[int]) -> None:
    every = np.array(pages)
    order = np.random.default_rng(0).permutation(len(every))
    assert most_at_once(spans(every, order)) == brute_force(every, order)

"""In which order the images of an epoch are read: a function of seed and epoch, whoever shares the work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]

LANES, GROUP = 64, 4
"""Parts of an epoch that are read side by side in the order by pages, and how many of them a process has, at the least:
neighbours in a batch, which mixup mixes, are of other pages."""


_TOGETHER = 8  # images whose copies follow one after the other; even, as pairs of neighbours are mixed


class Order(Protocol):
    """The orders of all epochs.

    Attributes:
        pool: the images of the file that are read, rising.
        reshuffled: by epoch, behind how many images its order was drawn once more, and a number for how, one after
            the other.
    """

    pool: Indices
    reshuffled: Mapping[int, Sequence[tuple[int, int]]]

    def whole(self, epoch: int) -> Indices:
        """All images of an epoch, in their order, of all processes."""

    def shared(self, images: Indices, first: int) -> Indices:
        """The images of a batch of all processes, one process's part after another's.

        Args:
            images: of shape (batches, batch of all processes), as they come in an epoch.
            first: the place of the first of them in `whole`.
        """


@dataclass
class RandomOrder:
    """A shuffle of all images. An `Order`.

    With `repeats` it is of repeated augmentation (arXiv 1901.09335): each image of an epoch is several times near each
    other. An epoch is as long as it is otherwise, so it has one of so many images, others in each epoch. The k-th copy
    of an image counts as number image + k · images, which is what its crops are drawn by. Copies of `_TOGETHER` images
    follow one after the other: they meet in a batch, and no image is the neighbour of its own copy, with which mixup
    would mix it.

    Args:
        pool: the images that are read.
        seed: of the run.
        repeats: how often each image of an epoch is in it.
        images: of the file, where they are repeated.
    """

    pool: Indices
    seed: int
    reshuffled: Mapping[int, Sequence[tuple[int, int]]] = field(default_factory=dict)
    repeats: int = 1
    images: int = 0

    def whole(self, epoch: int) -> Indices:
        """See `Order`."""
        shuffled = np.random.default_rng((self.seed, epoch)).permutation(self.pool)
        if self.repeats > 1:
            shuffled = self._repeated(shuffled)
        for first, number in self.reshuffled.get(epoch, ()):
            shuffled[first:] = np.random.default_rng((self.seed, epoch, number)).permutation(shuffled[first:])
        return shuffled

    def shared(self, images: Indices, first: int) -> Indices:
        """As they come."""
        return images

    def _repeated(self, shuffled: Indices) -> Indices:
        """As many, of the first of them."""
        chosen = shuffled[: -(-len(shuffled) // self.repeats)]
        copies = chosen + self.images * np.arange(self.repeats)[:, None]
        groups = np.split(copies, range(_TOGETHER, len(chosen), _TOGETHER), axis=1)
        return np.concatenate([group.reshape(-1) for group in groups])[: len(shuffled)]


@dataclass
class PageOrder:
    """A shuffle within windows of pages, so that each process reads its own pages, one after another. An `Order`.

    The pages are shuffled, and cut into `LANES` parts of as many images. Of each lane the images of `window` pages
    after one another are shuffled, and the k-th image of the epoch is of lane k mod `LANES`: so a batch is drawn from
    `LANES · window` pages, others in each epoch, and a process, which takes the lanes that are its share of each
    batch, reads no others; of more than `LANES / GROUP` processes neighbours have pages in common. Nothing of the
    order depends on the number of processes or on the batch size.

    Args:
        pool: the images that are read.
        seed: of the run.
        pages: the page of each image of the file.
        window: pages of a lane whose images are shuffled together.
    """

    pool: Indices
    seed: int
    pages: Indices
    window: int
    reshuffled: Mapping[int, Sequence[tuple[int, int]]] = field(default_factory=dict)

    def whole(self, epoch: int) -> Indices:
        """See `Order`."""
        order = self._drawn(self.pool, np.random.default_rng((self.seed, epoch)))
        for first, number in self.reshuffled.get(epoch, ()):
            # In the lanes that the places of the epoch have: those who read on have the pages.
            draw = np.random.default_rng((self.seed, epoch, number))
            order[first:] = self._drawn(order[first:], draw, first % LANES)
        return order

    def shared(self, images: Indices, first: int) -> Indices:
        """By group of lanes."""
        count, together = images.shape
        groups = (first + np.arange(count * together).reshape(images.shape)) % LANES // GROUP
        return np.take_along_axis(images, np.argsort(groups, axis=1, kind="stable"), axis=1)

    def _drawn(self, images: Indices, draw: np.random.Generator, first_lane: int = 0) -> Indices:
        if not len(images):
            return images
        pages, page = np.unique(self.pages[images], return_inverse=True)
        rank = draw.permutation(len(pages))[page]
        by_page = np.lexsort((draw.random(len(images)), rank))  # of a page that lanes share each has random ones
        # As many images in each lane, but for one more in those that the last ones are of.
        places = np.arange(len(images))
        lane_of_place = (places + first_lane) % LANES
        sizes = np.bincount(lane_of_place, minlength=LANES)
        lane = np.repeat(np.arange(LANES), sizes)
        ranks = rank[by_page]
        begins = np.minimum(np.cumsum(sizes) - sizes, len(images) - 1)
        window = (ranks - ranks[begins][lane]) // self.window
        shuffled = np.lexsort((draw.random(len(images)), window, lane))
        result = np.empty_like(images)
        # The k-th place of a lane is the k-th of its images.
        result[np.argsort(lane_of_place, kind="stable")] = images[by_page][shuffled]
        return result


def share(order: Order, epoch: int, seen: int, rank: int, processes: int, batch: int) -> Indices:
    """What one process reads in an epoch, of which all together have seen the first `seen` images.

    The k-th batches of all processes together are the k-th batch of one process with as large a batch. What does not
    fill a batch of all is left out.

    Args:
        order: of all epochs.
        epoch: which.
        seen: images.
        rank: of the process.
        processes: how many.
        batch: images of a process.
    """
    left, together = order.whole(epoch)[seen:], processes * batch
    count = len(left) // together
    batches = order.shared(left[: count * together].reshape(count, together), seen)
    return np.ascontiguousarray(batches.reshape(count, processes, batch)[:, rank]).reshape(-1)


def distinct(labels: NDArray[np.int64], order: Indices, batch: int) -> float:
    """The mean number of classes in a batch, of full batches."""
    count = len(order) // batch
    batches = np.sort(labels[order[: count * batch]].reshape(count, batch), axis=1)
    return float((np.diff(batches, axis=1) > 0).sum(axis=1).mean() + 1.0) if count else 0.0

"""FFCV's `Loader` with a decoder, a traversal order and an epoch iterator of our own.

The order does not depend on the number of processes; the iterator can be stopped, and raises what its thread raised.

FFCV schedules, reads pages and recycles buffers; the pixels come from `augment.decode`, in threads of our own. FFCV
would compile a loop over the batch anew for every loader (4 to 7 seconds) and run it in numba's thread pool, which
takes two loaders at once only in some of its variants and accepts no more workers than cores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Empty, Full, Queue
from threading import Event
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssam_scale.data import augment
from ssam_scale.data.beton import JPEG
from ssam_scale.data.ffcv_import import (
    AllocationQuery,
    Compiler,
    EpochIterator,
    Loader,
    Operation,
    OrderOption,
    PipelineSpec,
    QuasiRandom,
    State,
    ToTensor,
    TraversalOrder,
    lib,
)
from ssam_scale.data.truncated import MappedFile
from ssam_scale.errors import UserError

augment.bind(lib)

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class View:
    """What is cut out of an image."""

    resolution: int
    training: bool
    seed: int = 0
    crop: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)
    flip: float = 0.0
    share: float = 1.0


class ImageDecoder(Operation):
    """Fills uint8 batches [N, resolution, resolution, 3] for the current `epoch`, an attribute to be set."""

    def __init__(self, path: Path, view: View, workers: int) -> None:
        super().__init__()
        self.epoch = 0
        self._file = MappedFile(path)
        self._view = view
        self._workers = workers
        self._pool = ThreadPoolExecutor(workers, "decode") if workers > 1 else None

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery]:
        """What FFCV asks: the shape of the output and the memory for it."""
        shape, kind = (self._view.resolution, self._view.resolution, 3), np.dtype("<u1")
        return replace(previous_state, jit_mode=True, shape=shape, dtype=kind), AllocationQuery(shape, kind)

    def generate_code(self) -> Callable[..., Any]:
        """What FFCV calls for each batch."""
        return self._decode

    def _decode(self, indices: Indices, out: NDArray[np.uint8], metadata: Any, storage: Any) -> NDArray[np.uint8]:
        fields = metadata[indices]
        pointers = fields["data_ptr"]
        sizes = storage[2][np.searchsorted(storage[1], pointers)].astype(np.int64)
        data, starts = _located(storage, pointers)
        indices = np.asarray(indices, np.int64)
        jpegs = fields["mode"] == JPEG
        heights, widths = fields["height"].astype(np.int64), fields["width"].astype(np.int64)
        bad = np.zeros(len(indices), np.bool_)
        view = self._view

        def decode(part: slice) -> None:
            augment.decode(
                data, starts[part], sizes[part], jpegs[part], heights[part], widths[part], indices[part],
                view.training, view.seed, self.epoch, view.crop, view.flip, view.share, out[part], bad[part],
            )  # fmt: skip

        if self._pool is None:
            decode(slice(0, len(indices)))
        else:
            # More pieces than threads, because images differ in how long they take.
            step = max(1, -(-len(indices) // (4 * self._workers)))
            list(self._pool.map(decode, [slice(start, start + step) for start in range(0, len(indices), step)]))
        self._file.check()
        if bad.any():
            path = self._file.path
            raise UserError(
                f"{path}: image {indices[bad][0]} is damaged; copy or write the file again "
                f"(`ssam-scale data check {path}`)"
            )
        return out[: len(indices)]


def _located(storage: Any, pointers: NDArray[np.uint64]) -> tuple[NDArray[np.uint8], Indices]:
    """The memory that images lie in, as [bytes], and where in it, for pointers into the file."""
    if len(storage) == 3:  # the whole file, mapped
        return np.asarray(storage[0]), pointers.astype(np.int64)
    memory, _, _, page_to_slot = storage  # the pages that are in memory now
    page_size = memory.shape[1]
    pages = (pointers // np.uint64(page_size)).astype(np.int64)
    offsets = (pointers % np.uint64(page_size)).astype(np.int64)
    return memory.reshape(-1), page_to_slot[pages].astype(np.int64) * page_size + offsets


class LabelDecoder(Operation):
    """Fills int64 batches [N, 1] of labels."""

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery]:
        """What FFCV asks: the shape of the output and the memory for it."""
        kind = np.dtype("<i8")
        return replace(previous_state, jit_mode=True, shape=(1,), dtype=kind), AllocationQuery((1,), kind)

    def generate_code(self) -> Callable[..., Any]:
        """What FFCV calls for each batch."""

        def decode(indices: Indices, out: NDArray[np.int64], metadata: Any, storage: Any) -> NDArray[np.int64]:
            out[: len(indices), 0] = metadata[indices]
            return out[: len(indices)]

        return decode


class IndexDecoder(LabelDecoder):
    """Fills int64 batches [N, 1] of which images of the file they are."""

    def generate_code(self) -> Callable[..., Any]:
        """What FFCV calls for each batch."""

        def decode(indices: Indices, out: NDArray[np.int64], metadata: Any, storage: Any) -> NDArray[np.int64]:
            out[: len(indices), 0] = indices
            return out[: len(indices)]

        return decode


class SlicedShuffle(TraversalOrder):
    """A shuffle of the images per epoch, of which each process takes its slice of each batch.

    The k-th batches of all processes together are the k-th batch of one process with as large a batch, so that a run
    does not depend on how many processes share it.
    """

    def __init__(self, pool: Indices, seed: int, rank: int, world_size: int, batch: int) -> None:
        # FFCV's base class wants the loader, which does not exist before its order; nothing in there is needed.
        self._pool, self._seed = pool, seed
        self._rank, self._world_size, self._batch = rank, world_size, batch
        self.reshuffled: Mapping[int, Sequence[tuple[int, int]]] = {}
        """By epoch, from which image of the order on it was shuffled once more, and a number for how, one after the
        other."""

    def __call__(self, loader: Loader) -> SlicedShuffle:
        """FFCV calls the order with the loader it belongs to."""
        return self

    def sample_order(self, epoch: int, seen: int = 0) -> Indices:
        """The indices this process reads in `epoch`, of which all processes together have seen the first `seen`."""
        shuffled = np.random.default_rng((self._seed, epoch)).permutation(self._pool)
        for first, number in self.reshuffled.get(epoch, ()):
            shuffled[first:] = np.random.default_rng((self._seed, epoch, number)).permutation(shuffled[first:])
        shuffled = shuffled[seen:]
        count = len(shuffled) // (self._world_size * self._batch)  # of full batches
        batches = shuffled[: count * self._world_size * self._batch].reshape(count, self._world_size, self._batch)
        return np.ascontiguousarray(batches[:, self._rank]).reshape(-1)


class PagedShuffle(TraversalOrder):
    """FFCV's quasi-random order, as a function of the epoch.

    FFCV shuffles each page's images in place, on top of what the epochs before left there, so that an epoch after a
    resumption differs from the same epoch of an uninterrupted run. Here each epoch starts from the file's order.
    """

    def __init__(self) -> None:
        # As in SlicedShuffle, what FFCV's base class sets up is not needed.
        pass

    def __call__(self, loader: Loader) -> PagedShuffle:
        """FFCV calls the order with the loader it belongs to, whose tables it needs."""
        self._order = QuasiRandom(loader)
        self._pages = self._order.page_to_samples_array.copy()
        return self

    def sample_order(self, epoch: int, seen: int = 0) -> Indices:
        """The indices this process reads in `epoch`, of which it has seen the first `seen`."""
        self._order.page_to_samples_array[:] = self._pages
        return np.asarray(self._order.sample_order(epoch))[seen:]


class _StoppedError(Exception):
    """The epoch's thread has been asked to end."""


class _Outbox(Queue[Any]):
    """A queue whose writer is freed when the reader has gone away."""

    def __init__(self, stopped: Event, size: int) -> None:
        super().__init__(size)
        self._stopped = stopped

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        """Wait for room as long as the reader is there."""
        while not self._stopped.is_set():
            try:
                return super().put(item, True, 0.05)
            except Full:
                continue
        raise _StoppedError


class Epoch(EpochIterator):
    """One pass over the data in a thread of FFCV's, with a definite end: `stop` must be called, and waits for it."""

    failure: BaseException | None = None

    def start(self) -> None:
        """Called by FFCV at the end of the constructor."""
        self.output_queue = _Outbox(self.terminate_event, self.loader.batches_ahead)
        super().start()

    def run(self) -> None:
        """The thread. FFCV would leave the reader waiting for ever after an exception in here."""
        try:
            super().run()
        except _StoppedError:
            pass
        except BaseException as error:
            self.failure = error

    def next_batch(self) -> tuple[Any, ...] | None:
        """The next batch, in FFCV's buffers until the next call; None at the end. Raises what the thread raised."""
        while True:
            alive = self.is_alive()
            try:
                item = self.output_queue.get(timeout=0.2 if alive else 0.0)
            except Empty:
                if not alive:
                    raise self.failure or RuntimeError("the loader's thread has died") from None
                continue
            return None if item is None else item[1]

    def stop(self) -> None:
        """End the thread and free what it holds."""
        self.terminate_event.set()
        self.join()
        self.close()
        self.closed = True


class Reader:
    """FFCV's loader for one .beton file, as `ImageLoader` needs it."""

    def __init__(
        self,
        path: Path,
        view: View,
        order: SlicedShuffle | PagedShuffle | Indices,
        batch: int,
        workers: int,
        seed: int = 0,
        *,
        indices: bool = False,
    ) -> None:
        """`order`: a shuffle (PagedShuffle reads page by page into memory), or the indices to read, in their order.

        `indices`: whether batches say which images they hold.
        """
        self._decoder = ImageDecoder(path, view, workers)
        self._order = order
        options: dict[str, Any] = {"order": order, "os_cache": isinstance(order, SlicedShuffle)}
        if isinstance(order, np.ndarray):
            options = {"order": OrderOption.SEQUENTIAL, "indices": order, "os_cache": True, "drop_last": False}
        # What FFCV would compile is replaced by `augment.decode`; its switch is global, so it is put back at once.
        Compiler.set_enabled(False)
        try:
            self._loader = Loader(
                str(path),
                batch,
                num_workers=1,
                seed=seed,
                pipelines={
                    "image": PipelineSpec("image", self._decoder, [ToTensor()]),
                    "label": PipelineSpec("label", LabelDecoder(), [ToTensor()]),
                    **({"index": PipelineSpec("label", IndexDecoder(), [ToTensor()])} if indices else {}),
                },
                **options,
            )
        finally:
            Compiler.set_enabled(True)

    def __len__(self) -> int:
        return len(self._loader)

    def reshuffle(self, reshuffled: Mapping[int, Sequence[tuple[int, int]]]) -> None:
        """See `SlicedShuffle.reshuffled`."""
        assert isinstance(self._order, SlicedShuffle)
        self._order.reshuffled = reshuffled

    def start(self, epoch: int, seen: int = 0) -> Epoch:
        """Begin to read `epoch`, behind the first `seen` images of its order, of which nothing is read."""
        self._decoder.epoch = epoch
        if isinstance(self._order, np.ndarray):
            return Epoch(self._loader, self._order)
        order = self._order.sample_order(epoch, seen)
        return Epoch(self._loader, order[: len(order) - len(order) % self._loader.batch_size])

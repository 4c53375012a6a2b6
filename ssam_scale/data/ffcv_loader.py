"""FFCV's `Loader` with a decoder, a traversal order and an epoch iterator of our own.

The order does not depend on the number of processes; the iterator can be stopped, and raises what its thread raised.

FFCV schedules, reads pages and recycles buffers; the pixels come from `augment.decode`, in threads of our own. FFCV
would compile a loop over the batch anew for every loader (4 to 7 seconds) and run it in numba's thread pool, which
takes two loaders at once only in some of its variants and accepts no more workers than cores.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from queue import Empty, Full, Queue
from threading import Event
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ssam_scale.config.schema import Interpolation, Progressive
from ssam_scale.data import augment, crop, resize
from ssam_scale.data.damaged import Damaged, OnDamaged
from ssam_scale.data.ffcv_import import (
    AllocationQuery,
    Compiler,
    EpochIterator,
    Loader,
    Operation,
    OrderOption,
    PipelineSpec,
    State,
    ToTensor,
    TraversalOrder,
    lib,
)
from ssam_scale.data.images import Images, Indices, InMemory, Reading
from ssam_scale.data.order import Order, PageOrder, share
from ssam_scale.data.read_ahead import ReadAhead

_crops, _resizer = crop.library(), resize.library()
augment.bind(lib, _crops, _resizer)


@dataclass(frozen=True)
class View:
    """What is cut out of an image."""

    resolution: int
    training: bool
    seed: int = 0
    crop: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)
    flip: float = 0.0
    share: float = 1.0
    interpolation: Interpolation = "bilinear"
    progressive: Progressive | None = None

    def of(self, epoch: int) -> View:
        """Of an epoch, whose crops may be smaller."""
        if self.progressive is None:
            return self
        return replace(self, resolution=self.progressive.side(epoch, self.resolution))


class ImageDecoder(Operation):
    """Fills uint8 batches [N, resolution, resolution, 3] of an epoch.

    Args:
        reading: where images come from.
        count: how many there are.
        view: what is cut out of an image.
        workers: threads that decode.
        damaged: what becomes of images that are.
    """

    def __init__(self, reading: Reading, count: int, view: View, workers: int, damaged: Damaged) -> None:
        super().__init__()
        self._count, self._reading, self._whole, self._workers, self._damaged = count, reading, view, workers, damaged
        self._view = view  # of this epoch
        self._pool = ThreadPoolExecutor(workers, "decode") if workers > 1 else None
        self._epoch = 0
        self._read_ahead: ReadAhead | None = None
        self._place = 0  # of the next image, in what this process reads of the epoch

    def begin(self, epoch: int, read_ahead: ReadAhead | None) -> None:
        """What is decoded next is of this epoch, whose pages are perhaps read ahead.

        Raises:
            UserError: the images are not those that they were.
        """
        self._reading.begin()
        self._epoch, self._read_ahead, self._place = epoch, read_ahead, 0
        self._view = self._whole.of(epoch)

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery]:
        """What FFCV asks: the shape of the output and the memory for it."""
        shape, kind = (self._whole.resolution, self._whole.resolution, 3), np.dtype("<u1")
        return replace(previous_state, jit_mode=True, shape=shape, dtype=kind), AllocationQuery(shape, kind)

    def generate_code(self) -> Callable[..., Any]:
        """What FFCV calls for each batch."""
        return self._decode

    def _decode(self, indices: Indices, out: NDArray[np.uint8], metadata: Any, storage: Any) -> NDArray[np.uint8]:
        side = self._view.resolution
        # Smaller images take the beginning of the memory of larger ones.
        out = out.reshape(-1)[: len(out) * side * side * 3].reshape(-1, side, side, 3)
        copies, images = np.divmod(np.asarray(indices, np.int64), self._count)
        seen, keys = self._damaged.replaced(images), copies * self._count
        bad = self.decode_into(seen, out, keys)
        self._reading.check()
        for place in np.flatnonzero(bad).tolist():
            own, key = out[place : place + 1], keys[place : place + 1]

            def is_sound(other: int, own: NDArray[np.uint8] = own, key: Indices = key) -> bool:
                return not self.decode_into(np.array([other]), own, key).any()

            self._damaged.replace(int(images[place]), is_sound)
        self._place += len(indices)
        if self._read_ahead is not None:
            self._read_ahead.advance(self._place)
        return out[: len(indices)]

    def decode_into(self, images: Indices, out: NDArray[np.uint8], keys: Indices) -> NDArray[np.bool_]:
        """Fill `out` with these images as they are in this epoch, whatever is wrong with them.

        Args:
            images: their numbers.
            out: uint8 [images, side, side, 3].
            keys: int64 [images], with its number what the crop of each is drawn by.

        Returns:
            [images] whether each is damaged.
        """
        bad = np.zeros(len(images), np.bool_)

        def decode(part: slice) -> None:
            _decode(
                self._reading, images[part], self._view, self._epoch, out[part], bad[part], keys[part],
                crops=_crops is not None,
            )  # fmt: skip

        if self._pool is None or len(images) == 1:
            decode(slice(0, len(images)))
        else:
            # More pieces than threads, because images differ in how long they take.
            step = max(1, -(-len(images) // (4 * self._workers)))
            list(self._pool.map(decode, [slice(start, start + step) for start in range(0, len(images), step)]))
        return bad

    def close(self) -> None:
        """End its threads."""
        if self._pool is not None:
            self._pool.shutdown()


def undecodable(reading: Reading, images: Indices) -> NDArray[np.bool_]:
    """Of which of these images libjpeg complains, or that have another size than a file's table says."""
    bad, small = np.zeros(len(images), np.bool_), np.empty((len(images), 8, 8, 3), np.uint8)
    _decode(reading, images, View(8, False), 0, small, bad, np.zeros_like(images), crops=False)
    return bad


def _decode(
    reading: Reading,
    images: Indices,
    view: View,
    epoch: int,
    out: NDArray[np.uint8],
    bad: NDArray[np.bool_],
    keys: Indices,
    *,
    crops: bool,
) -> None:
    """`augment.decode` of images, once more of those that may be sound all the same."""
    code = resize.INTERPOLATIONS.index(view.interpolation)

    def decode(stored: InMemory, part: slice, crops: bool) -> None:
        augment.decode(
            stored.data, stored.starts, stored.sizes, stored.is_jpeg, stored.heights, stored.widths,
            images[part] + keys[part],
            view.training, view.seed, epoch, view.crop, view.flip, view.share, code, crops, _resizer is not None,
            stored.sums, out[part], bad[part],
        )  # fmt: skip

    for start in range(0, len(images), reading.at_once):
        few = slice(start, start + reading.at_once)
        decode(reading.fetch(images[few]), few, crops)
    for place in np.flatnonzero(bad).tolist():
        if (other := reading.again(int(images[place]))) is not None:
            bad[place] = False
            decode(other, slice(place, place + 1), False)


def seconds_to_decode(images: Images, view: View) -> Callable[[Indices, int], float]:
    """A stop-watch: how long so many threads take to decode some of these images, as they are in the first epoch."""
    reading, first = images.reading(), view.of(0)

    def seconds(few: Indices, workers: int) -> float:
        out = np.empty((len(few), first.resolution, first.resolution, 3), np.uint8)
        decoder = ImageDecoder(reading, images.images, first, workers, Damaged(images, "skip"))
        numbers, keys = few % images.images, np.zeros_like(few)  # a second copy of an image takes as long as the first
        begun = time.perf_counter()
        decoder.decode_into(numbers, out, keys)
        taken = time.perf_counter() - begun
        decoder.close()
        return taken

    return seconds


class LabelDecoder(Operation):
    """Fills int64 batches [N, 1] of labels."""

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery]:
        """What FFCV asks: the shape of the output and the memory for it."""
        kind = np.dtype("<i8")
        return replace(previous_state, jit_mode=True, shape=(1,), dtype=kind), AllocationQuery((1,), kind)

    def generate_code(self) -> Callable[..., Any]:
        """What FFCV calls for each batch."""

        def decode(indices: Indices, out: NDArray[np.int64], metadata: Any, storage: Any) -> NDArray[np.int64]:
            out[: len(indices), 0] = metadata[indices % len(metadata)]
            return out[: len(indices)]

        return decode


class IndexDecoder(LabelDecoder):
    """Fills int64 batches [N, 1] of which images of the file they are, and which copies of them (`RandomOrder`)."""

    def generate_code(self) -> Callable[..., Any]:
        """What FFCV calls for each batch."""

        def decode(indices: Indices, out: NDArray[np.int64], metadata: Any, storage: Any) -> NDArray[np.int64]:
            out[: len(indices), 0] = indices
            return out[: len(indices)]

        return decode


class SharedOrder(TraversalOrder):
    """An `Order` of which one process reads its share.

    Args:
        order: of all processes.
        rank: of this process.
        processes: how many.
        batch: images in a batch of this process.
    """

    def __init__(self, order: Order, rank: int, processes: int, batch: int) -> None:
        # FFCV's base class wants the loader, which does not exist before its order; nothing in there is needed.
        self.order, self._rank, self._processes, self._batch = order, rank, processes, batch

    def __call__(self, loader: Loader) -> SharedOrder:
        """FFCV calls the order with the loader it belongs to."""
        return self

    def sample_order(self, epoch: int, seen: int = 0) -> Indices:
        """The indices this process reads in `epoch`, of which all processes together have seen the first `seen`."""
        return share(self.order, epoch, seen, self._rank, self._processes, self._batch)


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
    read_ahead: ReadAhead | None = None
    _taken = 0  # batches

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

    def next_batch(self, damaged: Damaged, labels: NDArray[np.int64]) -> tuple[Any, ...] | None:
        """The next batch, in FFCV's buffers until the next call; None at the end. Raises what the thread raised.

        Args:
            damaged: images in whose place others were decoded, which FFCV does not know; it may have looked the label
                up before.
            labels: int64 [images], of all images of the file.
        """
        while True:
            alive = self.is_alive()
            try:
                item = self.output_queue.get(timeout=0.2 if alive else 0.0)
            except Empty:
                if not alive:
                    raise self.failure or RuntimeError("the loader's thread has died") from None
                continue
            if item is None:
                return None
            batch: tuple[Any, ...] = item[1]
            if damaged.instead:
                size = self.loader.batch_size
                given = self.order[self._taken * size : (self._taken + 1) * size]
                copies, images = np.divmod(given, len(labels))
                seen = damaged.replaced(images)
                for out, values in zip(batch[1:], (labels[seen], seen + copies * len(labels)), strict=False):
                    out[:, 0] = torch.from_numpy(values)
            self._taken += 1
            return batch

    def stop(self) -> None:
        """End the thread and free what it holds."""
        self.terminate_event.set()
        self.join()
        if self.read_ahead is not None:
            self.read_ahead.stop()
            self.read_ahead = None
        self.close()
        self.closed = True


class Reader:
    """FFCV's loader of images, as `ImageLoader` needs it.

    Args:
        images: all that there are.
        view: what is cut out of an image.
        order: of epochs; or the indices to read, in their order.
        batch: images in a batch.
        workers: threads that decode.
        indices: whether batches say which images they hold.
        memory: bytes of .beton files that an order by pages keeps in memory, on all machines together.
        on_damaged: what becomes of images that are not what was written.

    Attributes:
        images: all that there are.
        damaged: the images that were met and are, and what became of them.

    Raises:
        UserError: a file cannot be mapped into memory.
    """

    def __init__(
        self,
        images: Images,
        view: View,
        order: SharedOrder | Indices,
        batch: int,
        workers: int,
        *,
        indices: bool = False,
        memory: int = 0,
        on_damaged: OnDamaged = "stop",
    ) -> None:
        self.images, self._memory = images, memory
        self._reading = images.reading()
        self.damaged = Damaged(images, on_damaged)
        self._decoder = ImageDecoder(self._reading, images.images, view, workers, self.damaged)
        self._order = order
        options: dict[str, Any] = {"order": order}
        if isinstance(order, np.ndarray):
            options = {"order": OrderOption.SEQUENTIAL, "indices": order, "drop_last": False}
        # What FFCV would compile is replaced by `augment.decode`; its switch is global, so it is put back at once.
        Compiler.set_enabled(False)
        try:
            with images.table() as (path, (image, label)):
                self._loader = Loader(
                    str(path),
                    batch,
                    num_workers=1,
                    os_cache=True,
                    pipelines={
                        # What comes out has names too long for a field, so that it comes in this order.
                        **dict.fromkeys((image, label)),
                        "pixels of an image": PipelineSpec(image, self._decoder, [ToTensor()]),
                        "label of an image": PipelineSpec(label, LabelDecoder(), [ToTensor()]),
                        **(
                            {"number of an image": PipelineSpec(label, IndexDecoder(), [ToTensor()])} if indices else {}
                        ),
                    },
                    **options,
                )
        finally:
            Compiler.set_enabled(True)
        # The decoder knows where images are, and FFCV need not map the file once more.
        self._loader.memory_manager.context.mmap = np.empty(0, np.uint8)

    def __len__(self) -> int:
        return len(self._loader)

    def reshuffle(self, reshuffled: Mapping[int, Sequence[tuple[int, int]]]) -> None:
        """See `Order.reshuffled`."""
        assert isinstance(self._order, SharedOrder)
        self._order.order.reshuffled = reshuffled

    def start(self, epoch: int, seen: int = 0) -> Epoch:
        """Begin to read `epoch`, behind the first `seen` images of its order, of which nothing is read."""
        if isinstance(self._order, np.ndarray):
            self._decoder.begin(epoch, None)
            return Epoch(self._loader, self._order)
        order = self._order.sample_order(epoch, seen)
        by_pages = isinstance(self._order.order, PageOrder)
        read_ahead = self._reading.read_ahead(order, self._memory) if by_pages else None
        self._decoder.begin(epoch, read_ahead)
        running = Epoch(self._loader, order)
        running.read_ahead = read_ahead
        return running

    def next_batch(self, running: Epoch) -> tuple[Any, ...] | None:
        """The next batch of an epoch that `start` began: see `Epoch.next_batch`."""
        return running.next_batch(self.damaged, self.images.labels)

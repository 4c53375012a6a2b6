"""Loaders of normalised images on the device, deterministic and independent of the number of processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import psutil
import torch
from numpy.typing import NDArray

from ssam_scale.config.schema import Data
from ssam_scale.cores import usable_cores
from ssam_scale.data.aside import Aside
from ssam_scale.data.damaged import OnDamaged
from ssam_scale.data.images import Images
from ssam_scale.data.opening import names_of_classes, open_images
from ssam_scale.data.order import LANES, Order, PageOrder, RandomOrder
from ssam_scale.data.several import other_classes
from ssam_scale.data.workers import Workers, measured
from ssam_scale.errors import UserError

if TYPE_CHECKING:
    from ssam_scale.data.device_augment import DeviceAugment
    from ssam_scale.data.ffcv_loader import Epoch, Reader


class Batch(NamedTuple):
    """Images and labels on the device; the tensors are the caller's to keep."""

    images: torch.Tensor
    """float32 [N, 3, H, W], normalised by mean and std; channels_last on CUDA."""
    labels: torch.Tensor
    """int64 [N]."""


class IndexedBatch(Batch):
    """A batch that also says which images it holds; as a tuple it is images and labels, like any other.

    Attributes:
        indices: int64 [N], of the images in their file, in the memory of the host.
    """

    indices: torch.Tensor


class ImageLoader:
    """Iterates over the batches of one epoch of one process; made by `train_loader` and `eval_loader`.

    Iterating again repeats the same epoch until `set_epoch` is called. Only one iteration runs at a time: starting a
    new one ends the one before.
    """

    def __init__(
        self,
        reader: Reader,
        *,
        images: int,
        pool: int,
        batches_everywhere: int,
        workers: Workers,
        device: torch.device,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        augment: DeviceAugment | None = None,
        indexed: bool = False,
    ) -> None:
        self.images = images
        """How many images this process reads in one epoch."""
        self.pool = pool
        """How many images the order of an epoch has, of all processes, what none of them reads at its end included."""
        self.batches_everywhere = batches_everywhere
        """The largest number of batches any process has: collective forwards have to be run that often."""
        self.workers = workers
        """The threads that decode."""
        self._reader = reader
        self._running: Epoch | None = None
        self._epoch = self._seen = 0
        self._device, self._augment, self._indexed = device, augment, indexed
        self.aside = Aside(device)
        """Where batches are copied to the device and normalised; more can be done with them there."""
        self._scale = (1.0 / (255.0 * torch.tensor(std))).view(1, 3, 1, 1).to(device)
        self._shift = (-torch.tensor(mean) / torch.tensor(std)).view(1, 3, 1, 1).to(device)

    @property
    def source(self) -> Images:
        """The images that are read."""
        return self._reader.images

    @property
    def damaged(self) -> dict[int, int]:
        """Damaged images that this process has met, and the image of the file that it has seen in the place of each."""
        return dict(self._reader.damaged.instead)

    def __len__(self) -> int:
        """Batches of this process in a whole epoch."""
        return len(self._reader)

    def set_epoch(self, epoch: int, seen: int = 0) -> None:
        """Choose the epoch to iterate over next; order, crops and flips are a function of it and the seed.

        Args:
            epoch: from 0.
            seen: images at the beginning of its order, of all processes, that are left out and not read. However many
                processes and whatever batches they were seen by: the order of an epoch is the same for all of them.
        """
        self._epoch, self._seen = epoch, seen

    def reshuffle(self, reshuffled: Mapping[int, Sequence[tuple[int, int]]]) -> None:
        """Order the rest of epochs anew, behind images that have been seen.

        Args:
            reshuffled: by epoch, behind how many images of its order, and a number that no other time has; one after
                the other, if several times.
        """
        self._reader.reshuffle(reshuffled)

    def __iter__(self) -> Generator[Batch, None, None]:
        """Yield the batches of the epoch.

        Raises:
            UserError: an image in the file is damaged.
        """
        decoded, epoch = self.decoded(), self._epoch
        self.aside.follow()  # mean and std are there
        try:
            for item in decoded:
                batch = self._on_device(epoch, *item)
                self.aside.hand_over(batch)
                yield batch
                self.aside.wait_for_copies()  # FFCV refills these buffers once the next batch is asked for
        finally:
            self.aside.wait_for_copies()
            decoded.close()

    def decoded(self) -> Generator[tuple[torch.Tensor, ...], None, None]:
        """Yield the batches of the epoch as they are decoded, in buffers of the host that the next ones fill.

        Each is uint8 [N, H, W, 3], int64 labels [N, 1] and, where the loader was made for them, int64 indices [N, 1].

        Raises:
            UserError: an image in the file is damaged.
        """
        self.close()
        with torch.cuda.device(self._device) if self.aside.overlaps else nullcontext():
            # Buffers are pinned for whichever device is the current one.
            running = self._running = self._reader.start(self._epoch, self._seen)
        try:
            while (item := self._reader.next_batch(running)) is not None:
                yield item
        finally:
            running.stop()
            if self._running is running:
                self._running = None

    def close(self) -> None:
        """End the iteration that is under way, if any."""
        if self._running is not None:
            self._running.stop()
            self._running = None

    def _on_device(self, epoch: int, pixels: torch.Tensor, labels: torch.Tensor, *indices: torch.Tensor) -> Batch:
        """A batch of its own from FFCV's buffers: uint8 [N, H, W, 3] and int64 [N, 1], and perhaps indices [N, 1]."""
        keys = indices[0][:, 0].numpy().copy() if indices else np.empty(0, np.int64)
        pixels, labels = pixels.permute(0, 3, 1, 2), labels[:, 0]
        with self.aside:
            if self.aside.overlaps:
                pixels, labels = pixels.to(self._device, non_blocking=True), labels.to(self._device, non_blocking=True)
                self.aside.note_copies()
            else:
                labels = labels.to(self._device, copy=True)
            batch = Batch(self._normalised(epoch, pixels, keys), labels)
        if not self._indexed:
            return batch
        indexed = IndexedBatch(*batch)
        indexed.indices = torch.from_numpy(keys % self.source.images)
        return indexed

    def _normalised(self, epoch: int, pixels: torch.Tensor, keys: NDArray[np.int64]) -> torch.Tensor:
        """float32 of uint8 [N, 3, H, W], augmented before and after."""
        if self._augment is not None:
            if not self.aside.overlaps:
                pixels = pixels.clone()
            pixels = self._augment.pixels(pixels, keys, epoch)
        # On CUDA the memory format is kept, which is channels_last. On a CPU torch 2.13's convolutions write behind
        # their memory in it (8 channels, 192 px).
        layout = torch.preserve_format if self.aside.overlaps else torch.contiguous_format
        images = pixels.to(self._device, torch.float32, memory_format=layout).mul_(self._scale).add_(self._shift)
        if self._augment is not None:
            self._augment.normalised_(images, keys, epoch)
        return images


def train_loader(
    data: Data,
    *,
    rank: int,
    world_size: int,
    device: torch.device,
    seed: int,
    micro_batch: int,
    num_classes: int,
    indices: bool = False,
) -> ImageLoader:
    """Training images: random crops and flips, `micro_batch` of them per process and batch, the remainder dropped.

    No image is seen twice in an epoch. The k-th batches of all processes together hold the images, cropped and flipped
    alike, that one process with `micro_batch * world_size` would see in its k-th batch. With `indices` a batch says
    which images it holds (`IndexedBatch`).

    Raises:
        UserError: the file is missing, damaged or no .beton; too few images; a label outside the model's classes; more
            `data.memory` than there is.
    """
    source = _checked(data.train, data.val, num_classes, "data.train")
    together = micro_batch * world_size
    images = images_of_an_epoch(data, source.images, together)
    from ssam_scale.data.device_augment import device_augment
    from ssam_scale.data.ffcv_loader import Reader, SharedOrder, View, seconds_to_decode

    crop = (*data.crop_scale, *data.crop_ratio)
    view = View(
        data.resolution,
        True,
        seed,
        crop,
        data.flip,
        interpolation=data.interpolation,
        progressive=data.progressive,
    )
    augment = device_augment(data, seed)
    memory = int(data.memory * 2**30)
    _check_memory(data, source, world_size)
    order = _order(data, source, _pool(source.images, images), seed, memory)
    shared = SharedOrder(order, rank, world_size, micro_batch)
    workers = _workers(
        data,
        world_size,
        lambda most: measured(seconds_to_decode(source, view), shared.sample_order(0)[:micro_batch], most),
    )
    reader = Reader(
        source,
        view,
        shared,
        micro_batch,
        workers.count,
        indices=indices or augment is not None,
        memory=memory,
        on_damaged=data.on_damaged,
    )
    return ImageLoader(
        reader,
        images=len(reader) * micro_batch,
        pool=images,
        batches_everywhere=len(reader),
        workers=workers,
        device=device,
        mean=data.mean,
        std=data.std,
        augment=augment,
        indexed=indices,
    )


def images_of_an_epoch(data: Data, images: int, at_once: int = 0) -> int:
    """How many images the order of an epoch has, what no step reads at its end included.

    Args:
        data: of the configuration.
        images: that `data.train` has.
        at_once: images that are needed at once, if more than those of a step.

    Raises:
        UserError: they are fewer than are wanted, or than one batch.
    """
    if data.subset is not None and data.subset > images:
        raise UserError(f"data.subset {data.subset:,}: {data.train} has {images:,} images")
    images, at_once = data.subset or images, max(data.batch_size, at_once)
    if images < at_once:
        raise UserError(
            f"{data.train}: {images:,} images are fewer than one batch of {at_once:,}; lower data.batch_size or use "
            "more images"
        )
    return images


def images_by_class(data: Data, images: Images, num_classes: int) -> NDArray[np.int64]:
    """How many of the images that are trained on each class has, [num_classes]; `data.subset` is of all of them.

    Args:
        data: of the configuration.
        images: that `data.train` names, at least `data.subset`.
        num_classes: of the model.

    Raises:
        UserError: a label outside the model's classes.
    """
    _check_labels(images, num_classes, f"data.train {data.train}")
    labels = images.labels[_pool(images.images, data.subset or images.images)]
    return np.bincount(labels, minlength=num_classes)


def sample_loader(
    data: Data,
    place: Path,
    images: int,
    *,
    rank: int,
    world_size: int,
    device: torch.device,
    batch: int,
    num_classes: int,
    workers: Workers | None = None,
) -> ImageLoader:
    """Central crops of some images, the same random choice always, each exactly once over all processes.

    Args:
        data: how images are cropped, resized and normalised: its `eval_` keys; of `data.train`, what is chosen is of
            those that are trained on (`data.subset`).
        place: of the images: `data.train`, `data.val` or any others of the same classes.
        images: how many, or all where there are not so many.
        rank: of this process.
        world_size: number of processes.
        device: where batches go.
        batch: images in a batch of this process.
        num_classes: of the model.
        workers: threads that decode; None: as `data.workers` says.

    Raises:
        UserError: the images are missing or damaged, or fewer than processes; a label outside the model's classes.
    """
    trained = place == data.train
    source = _checked(place, data.val if trained else data.train, num_classes, f"data.{'train' if trained else 'val'}")
    pool = _pool(source.images, (trained and data.subset) or source.images)
    count = min(images, len(pool))
    if count < world_size:
        raise UserError(f"{place}: {count} images are fewer than one for each of {world_size} processes")
    chosen = pool if count == len(pool) else pool[draws(len(pool), count)[0]]
    mine = chosen[count * rank // world_size : count * (rank + 1) // world_size]
    from ssam_scale.data.ffcv_loader import Reader, View, seconds_to_decode

    view = View(data.eval_resolution, False, share=data.eval_crop_ratio, interpolation=data.interpolation)
    workers = workers or _workers(
        data, world_size, lambda most: measured(seconds_to_decode(source, view), mine[:batch], most)
    )
    most = -(-count // world_size)
    return ImageLoader(
        # Of the training images, those in whose place training sees others may be among them.
        Reader(source, view, mine, batch, workers.count, on_damaged=data.on_damaged),
        images=len(mine),
        pool=count,
        batches_everywhere=-(-most // batch),
        workers=workers,
        device=device,
        mean=data.mean,
        std=data.std,
    )


def eval_loader(
    data: Data,
    *,
    rank: int,
    world_size: int,
    device: torch.device,
    num_classes: int,
    micro_batch: int | None = None,
    workers: Workers | None = None,
) -> ImageLoader:
    """Validation images: central crops, each image exactly once over all processes, nothing padded or dropped.

    `data.eval_batch_size` of them in one batch of all processes; without it `micro_batch` on each process, as many as
    in training, by default the whole `data.batch_size`. They are decoded by `workers`, or by what `data.workers` says.

    Raises:
        UserError: the file is missing, damaged or no .beton; fewer images than processes; a label outside the model's
            classes.
    """
    source = _checked(data.val, data.train, num_classes, "data.val")
    if source.images == 0:
        raise UserError(f"{data.val}: holds no images; write it with `ssam-scale data write FOLDER {data.val}`")
    if source.images < world_size:
        raise UserError(f"{data.val}: {source.images} images are fewer than one for each of {world_size} processes")
    if data.eval_batch_size is None and micro_batch is not None:
        batch = micro_batch
    else:
        batch = max(1, (data.eval_batch_size or data.batch_size) // world_size)
    return central_loader(source, data, rank=rank, world_size=world_size, device=device, batch=batch, workers=workers)


def central_loader(
    images: Images,
    data: Data,
    *,
    device: torch.device,
    batch: int,
    rank: int = 0,
    world_size: int = 1,
    workers: Workers | None = None,
    on_damaged: OnDamaged = "stop",
) -> ImageLoader:
    """Central crops of any images in their order, each exactly once over all processes, whatever classes they are of.

    Args:
        images: at least one for each process.
        data: how they are cropped, resized and normalised: its `eval_` keys.
        device: where batches go.
        batch: images in a batch of this process.
        rank: of this process.
        world_size: number of processes.
        workers: threads that decode; None: as `data.workers` says.
        on_damaged: what becomes of images that are not what was written; `ImageLoader.damaged` lists them.
    """
    mine = np.arange(images.images * rank // world_size, images.images * (rank + 1) // world_size)
    most = -(-images.images // world_size)
    from ssam_scale.data.ffcv_loader import Reader, View, seconds_to_decode

    view = View(data.eval_resolution, False, share=data.eval_crop_ratio, interpolation=data.interpolation)
    workers = workers or _workers(
        data, world_size, lambda most: measured(seconds_to_decode(images, view), mine[:batch], most)
    )
    reader = Reader(images, view, mine, batch, workers.count, on_damaged=on_damaged)
    return ImageLoader(
        reader,
        images=len(mine),
        pool=images.images,
        batches_everywhere=-(-most // batch),
        workers=workers,
        device=device,
        mean=data.mean,
        std=data.std,
    )


def _check_memory(data: Data, source: Images, world_size: int) -> None:
    here = psutil.virtual_memory().total / 2**30
    own = min(data.memory, source.bytes / 2**30) * min(1.0, _local_processes() / world_size)
    if data.order == "pages" and own > here:
        raise UserError(
            f"data.memory {data.memory:g}: the processes of this machine would keep {own:.1f} GiB of {data.train} in "
            f"memory, and it has {here:.1f}; give a number below {data.memory * here / own:.0f}"
        )


def _order(data: Data, source: Images, pool: NDArray[np.int64], seed: int, memory: int) -> Order:
    if data.order == "random":
        return RandomOrder(pool, seed, repeats=data.repeats, images=source.images)
    assert source.pages is not None  # which `Data` says
    # Of each lane the pages of one window are in use while those of the next are read.
    return PageOrder(pool, seed, source.pages, max(1, memory // (2 * LANES * source.page_size)))


def _pool(images: int, wanted: int) -> NDArray[np.int64]:
    """Which images to train on."""
    return np.arange(images) if wanted == images else draws(images, wanted)[0]


def draws(images: int, *counts: int) -> list[NDArray[np.int64]]:
    """Disjoint random choices among `images`, each rising; always the same, since a file may be sorted by class."""
    order = np.random.default_rng(0).permutation(images)
    ends = np.cumsum(counts)
    return [np.sort(order[end - count : end]) for end, count in zip(ends, counts, strict=True)]


def _checked(place: Path, other: Path, num_classes: int, key: str) -> Images:
    """What images there are, once their labels are known to suit the model and the other images' classes."""
    images = open_images(place)
    _check_labels(images, num_classes, f"{key} {place}")
    theirs = names_of_classes(other)
    if images.class_names and theirs and images.class_names != theirs:
        mend = "the validation images with --classes-of the training images' file"
        if set(images.class_names) == set(theirs):
            mend = "both with the same --class-order"
        raise UserError(f"{place} and {other} {other_classes(images.class_names, theirs)}; write {mend}")
    return images


def _check_labels(images: Images, num_classes: int, named: str) -> None:
    labels = images.labels
    if images.images and not 0 <= labels.min() <= labels.max() < num_classes:
        outside = int(labels[(labels < 0) | (labels >= num_classes)][0])
        raise UserError(
            f"{named}: label {outside} is outside the model's {num_classes} classes; "
            f"set model.num_classes to {max(int(labels.max()) + 1, 2)} or more"
        )


def _workers(data: Data, world_size: int, measure: Callable[[int], Workers]) -> Workers:
    """Threads of a loader; `measure` finds out how many are needed of so many at the most."""
    if isinstance(data.workers, int):
        return Workers(data.workers)
    cores = max(1, usable_cores() // min(_local_processes(), world_size))
    return Workers(cores) if data.workers is None else measure(cores)


def _local_processes() -> int:
    """Of this run, on this machine, as torchrun or deepspeed says."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1"))

"""Readers of the same photographs, ours and others': what `ssam-scale bench loader` measures beside each other.

Each crops and flips at random as ImageNet's training does, and hands out uint8 batches in the host's memory.
"""

from __future__ import annotations

import io
import math
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ssam_scale.config.schema import Data

Epoch = Callable[[int], Iterator[int]]
"""Begins an epoch, given its number from 0, and yields how many images each batch has."""


@dataclass(frozen=True)
class Share:
    """What one process of a measurement reads, and how.

    Attributes:
        batch: images of one.
        resolution: side of the crops, pixels.
        workers: threads, or processes.
        rank: of the process.
        processes: of which each reads a part of the images.
    """

    batch: int
    resolution: int
    workers: int
    rank: int = 0
    processes: int = 1


def ours(path: Path, share: Share) -> Epoch:
    """`train_loader` of a .beton file, up to where a batch is copied to the device."""
    from ssam_scale.data.beton import inspect
    from ssam_scale.data.loaders import train_loader

    values = {"train": path, "val": path, "resolution": share.resolution, "workers": share.workers}
    loader = train_loader(
        Data.model_validate(values | {"batch_size": share.batch * share.processes}),
        rank=share.rank,
        world_size=share.processes,
        device=torch.device("cpu"),
        seed=0,
        micro_batch=share.batch,
        num_classes=inspect(path).classes + 1,
    )

    def epoch(number: int) -> Iterator[int]:
        loader.set_epoch(number)
        return (len(batch[0]) for batch in loader.decoded())

    return epoch


def ffcvs(path: Path, share: Share) -> Epoch:
    """FFCV's own loader and decoder of a .beton file, with its random order, ffcv-imagenet's crops and flips."""
    import numpy as np

    from ssam_scale.data.beton import inspect
    from ssam_scale.data.ffcv_import import Loader, OrderOption, own_pipelines

    loader = Loader(
        str(path),
        batch_size=share.batch,
        num_workers=share.workers,
        order=OrderOption.RANDOM,
        os_cache=True,
        drop_last=True,
        indices=np.arange(inspect(path).images)[share.rank :: share.processes],
        pipelines=own_pipelines(share.resolution),
    )

    def epoch(number: int) -> Iterator[int]:
        loader.next_epoch = number
        return (len(labels) for _, labels in loader)

    return epoch


def image_folder(folder: Path, share: Share) -> Epoch:
    """torchvision's `ImageFolder` under torch's `DataLoader`, whose workers stay."""
    crops = _torchvisions(share.resolution)
    from torch.utils.data import DataLoader, DistributedSampler
    from torchvision.datasets import ImageFolder

    images = ImageFolder(str(folder), crops)
    sampler: DistributedSampler[Any] = DistributedSampler(images, share.processes, share.rank)
    loader: DataLoader[Any] = DataLoader(images, share.batch, sampler=sampler, drop_last=True, **_others(share))

    def epoch(number: int) -> Iterator[int]:
        sampler.set_epoch(number)
        return (len(labels) for _, labels in loader)

    return epoch


def webdataset(folder: Path, share: Share) -> Epoch:
    """WebDataset of the tar archives in a folder, shuffled as its documentation shows."""
    import webdataset as wds

    def mine(shards: Iterable[Any]) -> Iterator[Any]:
        return (shard for index, shard in enumerate(shards) if index % share.processes == share.rank)

    crops = _torchvisions(share.resolution)
    urls = sorted(map(str, folder.glob("*.tar")))
    images = wds.WebDataset(urls, shardshuffle=100, nodesplitter=mine, detshuffle=True, seed=0).shuffle(1000)
    images = images.decode("pilrgb").to_tuple("jpg", "cls").map_tuple(crops).batched(share.batch, partial=False)
    loader = wds.WebLoader(images, batch_size=None, **_others(share))

    def epoch(number: int) -> Iterator[int]:
        return (len(labels) for _, labels in loader)

    return epoch


def dali(folder: Path, share: Share) -> Epoch:
    """NVIDIA's DALI, decoding on the CPU."""
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=share.batch, num_threads=share.workers, device_id=None, seed=0)
    def pipeline() -> Any:
        files, labels = fn.readers.file(
            file_root=str(folder), name="images", random_shuffle=True, shard_id=share.rank, num_shards=share.processes
        )
        area, ratio = [0.08, 1.0], [3 / 4, 4 / 3]
        images = fn.decoders.image_random_crop(
            files, device="cpu", output_type=types.RGB, random_area=area, random_aspect_ratio=ratio
        )
        side = share.resolution
        images = fn.resize(images, resize_x=side, resize_y=side, interp_type=types.INTERP_LINEAR, antialias=False)
        return fn.flip(images, horizontal=fn.random.coin_flip()), labels

    built = pipeline()
    built.build()
    images = built.epoch_size("images") // share.processes

    def epoch(number: int) -> Iterator[int]:
        for _ in range(images // share.batch):
            pixels, _labels = built.run()
            yield len(pixels)

    return epoch


def pack(folder: Path, out: Path, archives: int) -> None:
    """Tar archives of a folder's images, for WebDataset: every one has images of all classes."""
    images = [
        (path, label)
        for label, each in enumerate(sorted(path for path in folder.iterdir() if path.is_dir()))
        for path in sorted(each.iterdir())
        if path.is_file()
    ]
    out.mkdir()
    for number in range(archives):
        with tarfile.open(out / f"{number:04d}.tar", "w") as archive:
            for index, (path, label) in enumerate(images[number::archives]):
                for name, content in ((f"{index:06d}.jpg", path.read_bytes()), (f"{index:06d}.cls", b"%d" % label)):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))


def installed(module: str) -> bool:
    """Whether a module can be imported."""
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def archives_for(images: int, workers: int) -> int:
    """How many archives: as many for each of all processes' workers, some hundred images in one."""
    return workers * max(1, math.ceil(images / (500 * workers)))


def _others(share: Share) -> dict[str, Any]:
    """Of torch's `DataLoader`: one worker would be a process beside one that waits, so it computes in this one."""
    if share.workers == 1:
        return {}
    # A spawned process, as those of a measurement are, would spawn them.
    return {"num_workers": share.workers, "persistent_workers": True, "multiprocessing_context": "fork"}


def _torchvisions(resolution: int) -> Any:
    from ssam_scale.models.torchvision_ops import ensure_torchvision

    ensure_torchvision()
    from torchvision.transforms import Compose, PILToTensor, RandomHorizontalFlip, RandomResizedCrop

    return Compose([RandomResizedCrop(resolution), RandomHorizontalFlip(), PILToTensor()])

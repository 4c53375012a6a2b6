"""How fast photographs are read: by ours, by FFCV's own decoder and by torchvision's `ImageFolder`, in turns."""

from __future__ import annotations

import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ssam_scale.config.schema import Data
from ssam_scale.data import inspect, train_loader, write_beton
from ssam_scale.data.peers import Epoch, ffcvs, image_folder
from ssam_scale.tracking.environment import hardware_tags

OURS, FFCV, FOLDER = "ssam_scale", "FFCV", "ImageFolder"


@dataclass(frozen=True)
class Reader:
    """Something that reads images.

    Attributes:
        name: of it.
        stored: what it reads.
        make: begins to read, with so many workers.
    """

    name: str
    stored: str
    make: Callable[[int], Epoch]


def ours(path: Path, resolution: int, batch: int, workers: int) -> Epoch:
    """`train_loader` of a .beton file.

    Args:
        path: of the file.
        resolution: side of the crops, pixels.
        batch: images of one.
        workers: threads.
    """
    values = {"train": path, "val": path, "batch_size": batch, "resolution": resolution, "workers": workers}
    data = Data.model_validate(values)
    loader = train_loader(
        data,
        rank=0,
        world_size=1,
        device=torch.device("cpu"),
        seed=0,
        micro_batch=batch,
        num_classes=inspect(path).classes + 1,
    )

    def epoch(number: int) -> int:
        loader.set_epoch(number)
        return sum(len(batch.labels) for batch in loader)

    return epoch


def bench_loader(
    folder: Path, proportions: Sequence[float], workers: Sequence[int], resolution: int, batch: int, rounds: int
) -> list[dict[str, Any]]:
    """Images a second, and milliseconds of processors an image, of every reader.

    All epochs are of files that are in memory; the first one of each reader, in which it compiles, does not count.

    Args:
        folder: one folder of images per class.
        proportions: shares of images that a .beton file has as JPEG, one file each; the others are raw.
        workers: threads, or processes, one row each.
        resolution: side of the crops, pixels.
        batch: images of one.
        rounds: of which the median counts; in each, every reader has an epoch.

    Raises:
        UserError: the folder is none of images, or has fewer than a batch.
    """
    with tempfile.TemporaryDirectory(prefix="loader-") as temporary:
        readers = [Reader(FOLDER, "files", lambda count: image_folder(folder, resolution, batch, count))]
        for proportion in proportions:
            path = Path(temporary) / f"{proportion}.beton"
            report = write_beton(folder, path, jpeg_proportion=proportion, skip_bad=True, progress=False)
            stored = "JPEG" if proportion == 1.0 else f"{1.0 - proportion:.0%} raw"
            for name, make in ((OURS, ours), (FFCV, ffcvs)):
                readers.append(
                    Reader(name, stored, lambda count, make=make, path=path: make(path, resolution, batch, count))  # type: ignore[misc]
                )
        setting = {"photographs": report.images, "resolution": resolution, "hardware": hardware_tags()["hardware"]}
        rows: list[dict[str, Any]] = []
        for count in workers:
            rows += _in_turns(readers, count, rounds, setting)
    return rows


def _in_turns(readers: Sequence[Reader], workers: int, rounds: int, setting: dict[str, Any]) -> list[dict[str, Any]]:
    epochs = [reader.make(workers) for reader in readers]
    wall: list[list[float]] = [[] for _ in readers]
    processor: list[list[float]] = [[] for _ in readers]
    for number in range(rounds + 1):
        for index, epoch in enumerate(epochs):
            began, used = time.perf_counter(), _processor_seconds()
            images = epoch(number)
            if number:
                wall[index].append((time.perf_counter() - began) / images)
                processor[index].append((_processor_seconds() - used) / images)
    rows = []
    for index, reader in enumerate(readers):
        row = {
            "what": f"{reader.name}, {reader.stored}, {workers} worker{'s'[: workers > 1]}",
            "reader": reader.name,
            "stored": reader.stored,
            "workers": workers,
            "images_per_second": 1.0 / statistics.median(wall[index]),
            "processor_milliseconds": 1000.0 * statistics.median(processor[index]),
            "rounds": rounds,
            **setting,
        }
        for other, key in ((FFCV, "over_ffcv"), (FOLDER, "over_image_folder")):
            beside = [
                seconds
                for each, seconds in zip(readers, processor, strict=True)
                if each.name == other and each.stored in (reader.stored, "files") and each is not reader
            ]
            # Both of one round, so that a slow minute of the machine is everybody's.
            ratios = [theirs / its for of in beside for its, theirs in zip(processor[index], of, strict=True)]
            row[key] = statistics.median(ratios) if ratios else None
        rows.append(row)
    return rows


def _processor_seconds() -> float:
    """Of this process, and of those that it has waited for."""
    every = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in every)

"""How fast a file that is not in memory is read, by order, and from how many classes a batch is drawn.

    python benchmarks/cold_reads.py            # writes a file of 10,000 raw images (2.2 GiB), sorted by class
    python benchmarks/cold_reads.py FILE.beton

An epoch of one process, with crops of 16 pixels so that decoding is no limit, after the file was taken out of the
system's page cache; beside the same bytes read from the beginning of the file to its end, in pieces of 8 MiB. In turns.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ssam_scale.bench.record import provenance, result_path, write
from ssam_scale.cli.table import Columns, markdown
from ssam_scale.config.schema import Data
from ssam_scale.data import inspect, train_loader
from ssam_scale.data.beton import PAGE_SIZE
from ssam_scale.data.encode import Encoding
from ssam_scale.data.order import distinct
from ssam_scale.data.sources import Sample
from ssam_scale.data.write import write_samples

IMAGES, CLASSES, SIDE, BATCH = 10_000, 1_000, 280, 256
MEMORY = (0.125, 0.5, 1.0, 2.0)  # GiB; below the file's size pages are given back
COLUMNS: Columns = {
    "MB/s": ("megabytes_per_second", 1.0, ".0f"),
    "over reading it through": ("over", 1.0, ".2f"),
    "classes in a batch": ("classes", 1.0, ".1f"),
    "times": ("times", 1.0, ".0f"),
}


def noise(path: Path) -> None:
    """A file of raw images, in the order of their classes."""
    image = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    samples = [Sample(str(i), np.roll(image, i % SIDE, axis=1), i * CLASSES // IMAGES) for i in range(IMAGES)]
    names = [f"{index:04d}" for index in range(CLASSES)]
    write_samples(samples, names, path, Encoding(None, 90, 0.0, 0), source={}, progress=False)


def forget(path: Path) -> None:
    """Take a file out of the page cache, in which what is still mapped would stay."""
    gc.collect()
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_through(path: Path) -> float:
    """Seconds."""
    began = time.perf_counter()
    buffer = bytearray(PAGE_SIZE)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return time.perf_counter() - began


def epoch(path: Path, number: int, order: str, memory: float) -> tuple[float, float]:
    """Seconds, and classes in a batch."""
    beton = inspect(path)
    data = Data(
        train=path, val=path, batch_size=BATCH, resolution=16, order=order, memory=memory, crop_scale=(0.9, 1.0)
    )
    loader = train_loader(
        data,
        rank=0,
        world_size=1,
        device=torch.device("cpu"),
        seed=0,
        micro_batch=BATCH,
        num_classes=max(2, int(beton.labels.max()) + 1),
        indices=True,
    )
    loader.set_epoch(number)
    began = time.perf_counter()
    seen = [batch.indices.numpy() for batch in loader]
    seconds = time.perf_counter() - began
    return seconds, distinct(beton.labels, np.concatenate(seen), BATCH)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("beton", type=Path, nargs="?")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="of the file that is written [a temporary one]")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder of the result")
    arguments = parser.parse_args()
    made = provenance()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        path = arguments.beton or Path(folder) / "noise.beton"
        if arguments.beton is None:
            noise(path)
        size = path.stat().st_size
        ways = {"random": ("random", 8.0), **{f"pages, {memory:g} GiB": ("pages", memory) for memory in MEMORY}}
        epoch(path, 0, "random", 8.0)  # what is compiled is there
        seconds: dict[str, list[float]] = {way: [] for way in ("read through", *ways)}
        classes: dict[str, float] = {}
        for number in range(arguments.rounds):
            forget(path)
            seconds["read through"].append(read_through(path))
            for way, (order, memory) in ways.items():
                forget(path)
                taken, classes[way] = epoch(path, number, order, memory)
                seconds[way].append(taken)
    plain = statistics.median(seconds["read through"])
    rows: list[dict[str, Any]] = [
        {
            "what": way,
            "megabytes_per_second": size / 1e6 / statistics.median(each),
            "over": plain / statistics.median(each),
            "classes": classes.get(way),
            "times": len(each),
            "all_seconds": each,
        }
        for way, each in seconds.items()
    ]
    table = markdown(rows, COLUMNS, "what")
    print("\n".join(table))
    caption = f"{size / 2**30:.1f} GiB in pages of 8 MiB, batches of {BATCH}, one process; medians."
    text = ["# Cold reads by order", "", caption, "", *table]
    write(result_path(arguments.output, "cold-reads"), text, rows, made)


if __name__ == "__main__":
    main()

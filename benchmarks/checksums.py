"""What comparing each image's hash costs, of the time that reading photographs takes.

    python benchmarks/checksums.py PHOTOS      # a folder with a folder per class, as ImageFolder wants it

An epoch of one process and one thread, with the hashes that lie beside the file and without them, in turns: JPEGs, and
half of them raw, at their own size. Seconds of the CPU.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from ssam_scale.bench.record import provenance, result_path, write
from ssam_scale.cli.table import Columns, markdown
from ssam_scale.config.schema import Data
from ssam_scale.data import inspect, train_loader, write_beton
from ssam_scale.data.beton import Sidecar

BATCH = 20
COLUMNS: Columns = {
    "images": ("images", 1.0, ".0f"),
    "KB an image": ("kilobytes", 1.0, ".0f"),
    "ms an image": ("with_hashes", 1e3, ".3f"),
    "without hashes": ("without", 1e3, ".3f"),
    "hashes cost (%)": ("cost", 100.0, ".2f"),
    "rounds": ("rounds", 1.0, ".0f"),
}


def loader(path: Path, classes: int) -> Any:
    """Of training, on one thread."""
    data = Data(train=path, val=path, batch_size=BATCH, workers=1)
    return train_loader(
        data, rank=0, world_size=1, device=torch.device("cpu"), seed=0, micro_batch=BATCH, num_classes=classes
    )


def epoch(loader: Any, number: int) -> float:
    """Seconds of the CPU."""
    loader.set_epoch(number)
    began = time.process_time()
    for _ in loader:
        pass
    return time.process_time() - began


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder of the result")
    arguments = parser.parse_args()
    made, rows = provenance(), []
    with tempfile.TemporaryDirectory() as folder:
        for stored, jpegs in (("JPEG", 1.0), ("half raw", 0.5)):
            path, bare = Path(folder) / f"{jpegs}.beton", Path(folder) / f"{jpegs}-bare.beton"
            write_beton(arguments.photos, path, jpeg_proportion=jpegs, progress=False)
            bare.hardlink_to(path)
            assert len(inspect(path).sums)
            assert not Sidecar.path(bare).exists()
            beton = inspect(path)
            images, classes = beton.images, len(beton.sidecar.classes) if beton.sidecar else 0
            pair = [loader(each, classes) for each in (path, bare)]
            for each in pair:
                epoch(each, 0)
            times = [[epoch(each, number) for each in pair] for number in range(arguments.rounds)]
            with_hashes, without = (statistics.median(column) / images for column in zip(*times, strict=True))
            rows.append(
                {
                    "stored": stored,
                    "images": images,
                    "kilobytes": beton.sizes.mean() / 1e3,
                    "with_hashes": with_hashes,
                    "without": without,
                    "cost": statistics.median(a / b - 1 for a, b in times),
                    "rounds": arguments.rounds,
                    "all_seconds": times,
                }
            )
    table = markdown(rows, COLUMNS, "stored")
    print("\n".join(table))
    caption = "Photographs at their own size to crops of 224 pixels, one thread, medians of rounds in turns."
    write(result_path(arguments.output, "checksums"), ["# What hashes cost", "", caption, "", *table], rows, made)


if __name__ == "__main__":
    main()

"""Top-1 of the quickstart by `data.order`, with its 2,000 images in the order of their classes, in small pages.

    python benchmarks/order_accuracy.py            # 5 seeds, base optimizer and dense SAM: 20 runs

Images are stored at 336 px, so that pages of 2 MiB hold six of one class, as ImageNet's of 8 MiB hold some 75 where
its file is in class order; with a window of one page for each lane, the smallest there is, each batch of 128 comes from
64 pages of 334. Seeds in turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from ssam_scale.bench.record import provenance, result_path, write
from ssam_scale.cli.table import Columns, markdown
from ssam_scale.config.schema import Data
from ssam_scale.data import inspect, train_loader
from ssam_scale.data.encode import Encoding
from ssam_scale.data.fashion_mnist import CLASSES, FOLDER, read_part
from ssam_scale.data.loaders import draws
from ssam_scale.data.order import distinct
from ssam_scale.data.sources import Sample
from ssam_scale.data.write import write_samples

IMAGES, BATCH, PAGE, SIDE = 2_000, 128, 1 << 21, 336
METHODS = {"base": ["perturbation=null"], "dense SAM": ["perturbation.mask=null", "perturbation.rho=0.15"]}
ORDERS = {"random": ["data.order=random"], "pages": ["data.order=pages", "data.memory=0.001"]}
COLUMNS: Columns = {
    "top-1, %": ("top1", 1.0, ".2f"),
    "±": ("deviation", 1.0, ".2f"),
    "over random, paired": ("over", 1.0, "+.2f"),
    "classes in a batch": ("classes", 1.0, ".2f"),
    "rarest class's share of a batch, %": ("rarest", 100.0, ".1f"),
    "neighbours of one class, %": ("neighbours", 100.0, ".1f"),
    "seeds": ("seeds", 1.0, ".0f"),
}


def write_files(folder: Path) -> None:
    """The quickstart's 2,000 images, sorted by class, six a page, and all for validation."""
    chosen = {*draws(60_000, IMAGES)[0].tolist()}
    samples = (sample for index, sample in enumerate(read_part(FOLDER, "train")) if index in chosen)
    few = sorted((_enlarged(sample) for sample in samples), key=lambda sample: sample.label)
    places = ("beton", "part", "encode", "write")
    with mock.patch.multiple("ssam_scale.data.beton", PAGE_SIZE=PAGE):
        patches = [mock.patch(f"ssam_scale.data.{place}.PAGE_SIZE", PAGE) for place in places[1:]]
        for patch in patches:
            patch.start()
        write_samples(few, CLASSES, folder / "train.beton", Encoding(None, 90, 0.0, 0), source={}, progress=False)
        for patch in patches:
            patch.stop()
    samples = read_part(FOLDER, "val")
    write_samples(samples, CLASSES, folder / "val.beton", Encoding(None, 90, 0.0, 0), source={}, progress=False)


def _enlarged(sample: Sample) -> Sample:
    pixels = np.repeat(np.repeat(np.asarray(sample.source), SIDE // 28, axis=0), SIDE // 28, axis=1)
    return Sample(sample.name, pixels, sample.label)


def of_batches(folder: Path, order: str) -> dict[str, float]:
    """What batches are made of, over ten epochs."""
    path = folder / "train.beton"
    given: dict[str, Any] = dict(each.removeprefix("data.").split("=") for each in ORDERS[order])
    data = Data(train=path, val=path, batch_size=BATCH, resolution=28, **given)
    loader = train_loader(
        data,
        rank=0,
        world_size=1,
        device=torch.device("cpu"),
        seed=0,
        micro_batch=BATCH,
        num_classes=len(CLASSES),
        indices=True,
    )
    labels, classes, rarest, neighbours = inspect(path).labels, [], [], []
    for number in range(10):
        loader.set_epoch(number)
        seen = np.concatenate([batch.indices.numpy() for batch in loader])  # type: ignore[attr-defined]
        classes.append(distinct(labels, seen, BATCH))
        own = labels[seen].reshape(-1, BATCH)
        rarest.append(np.mean([np.bincount(batch, minlength=len(CLASSES)).min() / BATCH for batch in own]))
        neighbours.append((labels[seen[1:]] == labels[seen[:-1]]).mean())
    means = (float(np.mean(each)) for each in (classes, rarest, neighbours))
    return dict(zip(("classes", "rarest", "neighbours"), means, strict=True))


def top1(folder: Path, overrides: list[str]) -> float:
    """Of a training in a process of its own."""
    run = Path(tempfile.mkdtemp(dir=folder))
    given = [f"data.train={folder}/train.beton", f"data.val={folder}/val.beton", "data.subset=null"]
    given += [
        f"checkpoint.directory={run}",
        "train.eval_epochs=40",
        "checkpoint.every_epochs=40",
        f"tracking.uri=sqlite:///{run}/mlflow.db",
    ]
    config = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
    command = [sys.executable, "-m", "ssam_scale", "train", "--config", str(config), *given, *overrides]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return float(json.loads((run / "result.json").read_text())["top1"])


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder of the result")
    arguments = parser.parse_args()
    made = provenance()
    found: dict[tuple[str, str], list[float]] = {(m, o): [] for m in METHODS for o in ORDERS}
    with tempfile.TemporaryDirectory() as folder:
        write_files(Path(folder))
        about = {order: of_batches(Path(folder), order) for order in ORDERS}
        for seed in range(arguments.seeds):
            for (method, order), results in found.items():
                results.append(top1(Path(folder), [*METHODS[method], *ORDERS[order], f"train.seed={seed}"]))
                print(f"{method}, {order}, seed {seed}: {results[-1]:.2f}", flush=True)
    rows = [
        {
            "what": f"{method}, {order}",
            "top1": statistics.mean(results),
            "deviation": statistics.stdev(results),
            "over": statistics.mean(results) - statistics.mean(found[method, "random"]),
            **about[order],
            "seeds": len(results),
            "all": results,
        }
        for (method, order), results in found.items()
    ]
    table = markdown(rows, COLUMNS, "what")
    print("\n".join(table))
    caption = f"{IMAGES:,} images of Fashion-MNIST by class, six a page; batches of {BATCH} from 64 pages of 334."
    write(result_path(arguments.output, "order-accuracy"), ["# Top-1 by order", "", caption, "", *table], rows, made)


if __name__ == "__main__":
    main()

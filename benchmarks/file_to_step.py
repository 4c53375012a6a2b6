"""Images per second of `ssam-scale train` beside timm's loop, from photographs on the disk to the optimizer's step.

    python benchmarks/file_to_step.py PHOTOGRAPHS                 # a folder of them per class

Both train the same network on the same photographs with SGD, crops and flips at random, as many threads for decoding
as for computing share the machine's cores; each measurement is a new process, in turns, and its first epoch does not
count. timm's is its data loader and what its `train.py` does in a step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ssam_scale.bench.record import provenance, result_path, write
from ssam_scale.cli.table import Columns, markdown
from ssam_scale.data import write_beton

COLUMNS: Columns = {
    "images/s": ("images_per_second", 1.0, ",.1f"),
    "over timm's": ("over", 1.0, ".3f"),
    "waiting for data, share of the time": ("waiting", 1.0, ".3f"),
    "times": ("times", 1.0, ".0f"),
}


def timms(folder: Path, model: str, resolution: int, batch: int, epochs: int, workers: int) -> dict[str, float]:
    """timm's loop: images a second, and the share of the time in which it waits for its loader."""
    from ssam_scale.models import ensure_torchvision

    ensure_torchvision()
    import timm
    import torch
    from timm.data import create_dataset, create_loader
    from timm.optim import create_optimizer_v2

    torch.manual_seed(0)
    dataset = create_dataset("", root=str(folder), is_training=True, batch_size=batch)
    loader = create_loader(
        dataset, (3, resolution, resolution), batch, is_training=True, use_prefetcher=False, num_workers=workers,
        interpolation="bilinear", color_jitter=None, persistent_workers=workers > 0,
    )  # fmt: skip
    network = timm.create_model(model, num_classes=len(dataset.reader.class_to_idx))
    network.train()
    optimizer = create_optimizer_v2(network, "sgd", lr=0.01, momentum=0.9, weight_decay=1e-4)
    loss_fn = torch.nn.CrossEntropyLoss()
    images, waited, began = 0, 0.0, 0.0
    for epoch in range(epochs + 1):
        if epoch == 1:
            images, waited, began = 0, 0.0, time.perf_counter()
        asked = time.perf_counter()
        for pixels, labels in loader:
            waited += time.perf_counter() - asked
            loss = loss_fn(network(pixels), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            images += len(labels)
            asked = time.perf_counter()
    seconds = time.perf_counter() - began
    return {"images_per_second": images / seconds, "waiting": waited / seconds}


def ours(beton: Path, model: str, resolution: int, batch: int, epochs: int, classes: int) -> dict[str, float]:
    """`ssam-scale train`, recorded as it always is: the same two numbers from what it recorded."""
    from ssam_scale.tracking.store import open_store

    with tempfile.TemporaryDirectory() as temporary:
        store = f"sqlite:///{temporary}/mlflow.db"
        config = {
            "model": {"name": model, "num_classes": classes},
            "data": {"train": str(beton), "val": str(beton), "batch_size": batch, "resolution": resolution,
                     "eval_resolution": resolution},
            "optimizer": {"name": "sgd", "lr": 0.01, "momentum": 0.9, "weight_decay": 1e-4},
            "perturbation": None,
            "train": {"epochs": epochs + 1, "eval_epochs": epochs + 1, "seed": 0},
            "checkpoint": {"directory": f"{temporary}/checkpoints", "every_epochs": epochs + 1},
            "tracking": {"uri": store, "experiment": "x", "log_every": 1},
        }  # fmt: skip
        path = Path(temporary) / "config.yaml"
        path.write_text(json.dumps(config))  # YAML is more than JSON
        command = [sys.executable, "-m", "ssam_scale", "train", "--config", str(path)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        client = open_store(store, create=False)
        (experiment,) = client.search_experiments(filter_string="name = 'x'")
        (run,) = client.search_runs([experiment.experiment_id])
        history = {key: client.get_metric_history(run.info.run_id, key) for key in run.data.metrics}
    steps = len(history["train/images_per_second"])
    first = steps // (epochs + 1)

    def seconds(key: str) -> float:
        return sum(point.value for point in history[key][first:])

    step = sum(batch / point.value for point in history["train/images_per_second"][first:])
    return {"images_per_second": (steps - first) * batch / step, "waiting": seconds("time/data") / step}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photographs", type=Path, nargs="?")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--resolution", type=int, default=160)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2, help="of timm's loader")
    parser.add_argument("--timms", type=Path, help=argparse.SUPPRESS)  # a process that measures timm's
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder of the result")
    given = parser.parse_args()
    if given.timms is not None:
        found = timms(given.timms, given.model, given.resolution, given.batch_size, given.epochs, given.workers)
        print(json.dumps(found))
        return
    if given.photographs is None:
        parser.error("give a folder of photographs, with one folder per class")
    made = provenance()
    with tempfile.TemporaryDirectory() as temporary:
        loops: dict[str, Callable[[], dict[str, float]]] = {}

        def timms_process() -> dict[str, float]:
            names = ("model", "resolution", "batch_size", "epochs", "workers")
            options = [f"--{name.replace('_', '-')}={getattr(given, name)}" for name in names]
            command = [sys.executable, __file__, "--timms", str(given.photographs), *options]
            numbers: dict[str, float] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
            return numbers

        loops["timm's, ImageFolder"] = timms_process
        for name, share in (("JPEG", 1.0), ("half raw", 0.5)):
            path = Path(temporary) / f"{share}.beton"
            report = write_beton(given.photographs, path, jpeg_proportion=share, progress=False)
            classes = max(2, len(report.classes))

            def ours_now(path: Path = path, classes: int = classes) -> dict[str, float]:
                return ours(path, given.model, given.resolution, given.batch_size, given.epochs, classes)

            loops[f"ssam-scale train, {name}"] = ours_now
        found: dict[str, list[dict[str, float]]] = {name: [] for name in loops}
        for _ in range(given.rounds):
            for name, loop in loops.items():
                found[name].append(loop())
    plain = [each["images_per_second"] for each in found["timm's, ImageFolder"]]
    rows: list[dict[str, Any]] = [
        {
            "what": name,
            "images_per_second": statistics.median(each["images_per_second"] for each in measured),
            # Both of one round.
            "over": statistics.median(m["images_per_second"] / p for m, p in zip(measured, plain, strict=True)),
            "waiting": statistics.median(each["waiting"] for each in measured),
            "times": len(measured),
            "all": measured,
        }
        for name, measured in found.items()
    ]
    table = markdown(rows, COLUMNS, "what")
    print("\n".join(table))
    caption = (
        f"{given.model}, crops of {given.resolution} × {given.resolution}, batches of {given.batch_size}, base "
        f"optimizer, {report.images} photographs; medians of {given.rounds} processes each, in turns."
    )
    text = ["# From a file to the optimizer's step", "", caption, "", *table]
    write(result_path(given.output, "file-to-step"), text, rows, made)


if __name__ == "__main__":
    main()

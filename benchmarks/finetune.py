"""Fine-tuning from weights that were trained here: top-1 and cost of the base optimizer, dense SAM and late cuts.

    python benchmarks/finetune.py CIFAR        # a folder with train/ and test/, each with a folder of images per class

A ResNet is trained on five classes of CIFAR-10 (25,000 images), and then fine-tuned on 2,000 images of the other five,
as a sweep (`ssam-scale sweep`) over methods, radii and seeds: all radii are shown, and none is chosen. Both stages are
in --folder, in which the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import statistics
import subprocess
from pathlib import Path
from typing import Any

import scipy.stats
import yaml

from ssam_scale.bench.record import provenance, result_path, write
from ssam_scale.child import command
from ssam_scale.cli.table import Columns, markdown
from ssam_scale.config.sweep import LoadedSweep
from ssam_scale.sweep import result_of
from ssam_scale.tracking.compare.runs import find_experiment

FIRST = ("airplane", "bird", "deer", "frog", "ship")
OTHERS = ("automobile", "cat", "dog", "horse", "truck")
RADII = (0.05, 0.1, 0.2, 0.4)
CONFIG: dict[str, Any] = {
    "model": {"name": "resnet18", "num_classes": 5, "kwargs": {"channels": [16, 32, 64, 128], "stem_width": 16}},
    "data": {
        "batch_size": 64,
        "eval_batch_size": 1000,
        "resolution": 32,
        "eval_resolution": 32,
        "eval_crop_ratio": 1.0,
        "crop_scale": [1.0, 1.0],
        "crop_ratio": [1.0, 1.0],
        "mean": [0.491, 0.482, 0.447],
        "std": [0.247, 0.243, 0.262],
        "workers": 1,
    },
    "optimizer": {"name": "sgd", "momentum": 0.9, "weight_decay": 5e-4},
    "schedule": {"name": "cosine", "warmup_epochs": 1},
}


def behind(policy: str, cut: Any) -> dict[str, Any]:
    """A perturbation of the blocks behind a cut."""
    return {"perturbation": {"norm": "masked", "mask": {"pattern": "depth", "policy": policy, "cut": cut}}}


METHODS: dict[str, dict[str, Any]] = {
    "base": {"perturbation": None},
    "dense SAM": {"perturbation": {"norm": "masked"}},
    "cut in the later half": {
        "perturbation": {"norm": "masked", "mask": {"pattern": "depth", "policy": "rotate", "cut": [0.5, 1.0]}}
    },
    "cut at three quarters": {
        "perturbation": {"norm": "masked", "mask": {"pattern": "depth", "policy": "fixed", "cut": 0.75}}
    },
}
COLUMNS: Columns = {
    "rho": ("rho", 1.0, "g"),
    "top-1 %": ("top1", 1.0, ".2f"),
    "±": ("deviation", 1.0, ".2f"),
    "over base, paired": ("over_base", 1.0, "+.2f"),
    "p": ("p", 1.0, ".3f"),
    "over dense SAM at its best radius": ("over_sam", 1.0, "+.2f"),
    "time / base, by probes": ("overhead", 1.0, ".2f"),
    "seeds": ("seeds", 1.0, ".0f"),
}


def run(*arguments: str | Path) -> None:
    """`ssam-scale`, whose words are this program's."""
    subprocess.run(command([*map(str, arguments)], ended_by=signal.SIGTERM), check=True)


def write_files(cifar: Path, folder: Path) -> None:
    """first-train.beton, first-val.beton, others-train.beton and others-val.beton."""
    for name, classes in (("first", FIRST), ("others", OTHERS)):
        for part, source in (("train", "train"), ("val", "test")):
            file, images = folder / f"{name}-{part}.beton", folder / f"{name}-{part}"
            if file.exists():
                continue
            shutil.rmtree(images, ignore_errors=True)
            for each in classes:
                shutil.copytree(cifar / source / each, images / each)
            run("data", "write", images, file)
            shutil.rmtree(images)


def section(folder: Path, name: str, **data: Any) -> dict[str, Any]:
    """`data` of the files of one of the two stages."""
    files = {part: str(folder / f"{name}-{part}.beton") for part in ("train", "val")}
    return {**CONFIG["data"], **files, **data}


def pretrain(folder: Path) -> dict[str, Any]:
    """Train on the first classes, by the base optimizer; what it came to."""
    directory = folder / "pretrained"
    if not (directory / "result.json").exists():
        config = {
            **CONFIG,
            "data": section(folder, "first"),
            "optimizer": {**CONFIG["optimizer"], "lr": 0.1},
            "train": {"epochs": 15, "eval_epochs": 15},
            "checkpoint": {"directory": str(directory), "keep": 1},
            "tracking": {"uri": f"sqlite:///{folder}/mlflow.db", "experiment": "pretraining"},
        }
        (folder / "pretrain.yaml").write_text(yaml.safe_dump(config))
        run("train", "--config", folder / "pretrain.yaml", "--resume", "auto")
    found: dict[str, Any] = json.loads((directory / "result.json").read_text())
    return found


def finetune(folder: Path, images: int, epochs: int, seeds: int) -> LoadedSweep:
    """Do the sweep."""
    (checkpoint,) = (folder / "pretrained").glob("epoch_*")
    steps = epochs * (images // CONFIG["data"]["batch_size"])
    config = {
        **CONFIG,
        "model": {**CONFIG["model"], "pretrained": str(checkpoint)},
        "data": section(folder, "others", subset=images),
        "optimizer": {**CONFIG["optimizer"], "lr": 0.02},
        "train": {"epochs": epochs, "eval_epochs": epochs},
        "checkpoint": {"every_epochs": epochs, "keep": 1},
        "tracking": {
            "uri": f"sqlite:///{folder}/mlflow.db",
            "experiment": "finetuning",
            "probe_every": max(1, steps // 16),
            "log_model": False,
            "system_metrics": False,
        },
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    methods = {name.replace(" ", "-"): changes for name, changes in METHODS.items()}
    sweep = {
        "config": "run.yaml",
        "methods": methods,
        "grid": {"perturbation.rho": list(RADII)},
        "seeds": [*range(seeds)],
    }
    (folder / "finetune.yaml").write_text(yaml.safe_dump(sweep, sort_keys=False))
    run("sweep", folder / "finetune.yaml", "--folder", folder / "runs")
    return LoadedSweep(folder / "finetune.yaml", folder / "runs")


def rows_of(loaded: LoadedSweep, folder: Path) -> list[dict[str, Any]]:
    """A row for each method and radius."""
    tracked = {each.id: each for each in find_experiment(f"sqlite:///{folder}/mlflow.db", "finetuning").runs()}
    found: dict[tuple[str, float | None], dict[int, dict[str, Any]]] = {}
    for each in loaded.runs:
        rho = dict(each.knobs).get("perturbation.rho")
        found.setdefault((each.method.replace("-", " "), rho), {})[each.seed] = result_of(loaded, each)

    def top1(results: dict[int, dict[str, Any]]) -> list[float]:
        return [results[seed]["top1"] for seed in sorted(results)]

    base = top1(found["base", None])
    sam = max((top1(results) for (method, _), results in found.items() if method == "dense SAM"), key=statistics.mean)
    rows = []
    for (method, rho), results in found.items():
        tops = top1(results)
        percents = [tracked[each["run_id"]].metric("summary/overhead_vs_base_percent") for each in results.values()]
        known = [1.0 + percent / 100.0 for percent in percents if percent is not None]
        rows.append(
            {
                "what": method,
                "rho": rho,
                "top1": statistics.mean(tops),
                "deviation": statistics.stdev(tops),
                "over_base": None if method == "base" else statistics.mean(tops) - statistics.mean(base),
                "p": None if method == "base" else float(scipy.stats.ttest_rel(tops, base).pvalue),
                "over_sam": statistics.mean(tops) - statistics.mean(sam),
                "overhead": statistics.mean(known) if known else None,
                "seeds": len(tops),
                "all_top1": tops,
            }
        )
    return rows


def main() -> None:
    """Train, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cifar", type=Path)
    parser.add_argument("--folder", type=Path, default=Path("finetuning"), help="of files, checkpoints and store")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder of the result")
    arguments = parser.parse_args()
    made, folder = provenance(), arguments.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    write_files(arguments.cifar, folder)
    before = pretrain(folder)
    rows = rows_of(finetune(folder, arguments.images, arguments.epochs, arguments.seeds), folder)
    table = markdown(rows, COLUMNS, "what")
    print("\n".join(table))
    caption = (
        f"CIFAR-10 as JPEGs. A small ResNet was trained on {', '.join(FIRST)} (top-1 {before['top1']:.2f}%), "
        f"and fine-tuned on {arguments.images:,} images of {', '.join(OTHERS)} for {arguments.epochs} epochs by SGD; "
        "top-1 on 5,000 others. p: paired t test with the base optimizer, not corrected for the number of rows."
    )
    write(result_path(arguments.output, "finetune"), ["# Fine-tuning", "", caption, "", *table], rows, made)


if __name__ == "__main__":
    main()

"""Which pass BatchNorm's running statistics should come from: accuracy by those of the ascent, the descent, both.

    python benchmarks/batchnorm_statistics.py FOLDER --config configs/quickstart.yaml --seeds 5 data.batch_size=64

No training step reads the statistics, so one run keeps all three sets and is evaluated with each at its end. Each line
of `FOLDER/lines.jsonl` is one run; where it is there already the run is not repeated. The ascents are on the whole
batch and on an eighth and a sixteenth of it, at the radius that `--rho` names for each.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy import stats
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

from ssam_scale.bench.record import provenance, result_path, write
from ssam_scale.config.load import load
from ssam_scale.data import open_images
from ssam_scale.sharding import World, join_world
from ssam_scale.tracking.timer import PhaseTimer
from ssam_scale.train.build import build
from ssam_scale.train.checkpoint import load as load_checkpoint
from ssam_scale.train.checkpoint import newest
from ssam_scale.train.evaluation import evaluate
from ssam_scale.train.length import length_of
from ssam_scale.train.loop import train

SETS = {"ascent": (0,), "descent": (1,), "both": (0, 1)}
FRACTIONS = (1.0, 0.125, 0.0625)


class Sets:
    """Running statistics of every BatchNorm that is trained, by the passes that they take in."""

    def __init__(self) -> None:
        self.layers: dict[_BatchNorm, dict[str, tuple[Tensor, Tensor]]] = {}
        self._passes: dict[_BatchNorm, int] = {}

    def saw(self, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Before a forward: the first of a step is the ascent's, the second the descent's."""
        if not isinstance(layer, _BatchNorm) or not layer.training:
            return
        number = self._passes[layer] = self._passes.get(layer, -1) + 1
        with torch.no_grad():
            variance, mean = torch.var_mean(inputs[0], dim=(0, 2, 3), correction=1)
            sets = self.layers.setdefault(
                layer, {name: (torch.zeros_like(mean), torch.ones_like(variance)) for name in SETS}
            )
            for name, passes in SETS.items():
                if number in passes:
                    for running, of_batch in zip(sets[name], (mean, variance), strict=True):
                        running.lerp_(of_batch, layer.momentum or 0.0)

    def stepped(self, *_: Any) -> None:
        """After a step of the optimizer."""
        self._passes.clear()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Keep them of all that is trained inside."""
        handles = [register_module_forward_pre_hook(self.saw), register_optimizer_step_post_hook(self.stepped)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def one(config_path: Path, overrides: Sequence[str], folder: Path, world: World) -> dict[str, float]:
    """Train, and top-1 in percent by whose statistics it is evaluated with."""
    checkpoints = folder / "checkpoints"
    shutil.rmtree(checkpoints, ignore_errors=True)
    tracking = {"uri": f"sqlite:///{folder}/mlflow.db", "probe_every": "null", "log_model": "false"}
    own = [f"checkpoint.directory={checkpoints}", *(f"tracking.{key}={value}" for key, value in tracking.items())]
    config = load(config_path, [*overrides, *own])
    sets = Sets()
    with sets.watching():
        train(config, world)
    components = build(config, world, PhaseTimer(), length_of(config, open_images(config.data.train).images))
    path = newest(checkpoints)
    assert path is not None
    load_checkpoint(path, config, components)
    layers = [layer for layer in components.network.modules() if isinstance(layer, _BatchNorm)]
    # In the order in which the forward calls them, which is that of the modules in timm's ResNets.
    kept = list(sets.layers.values())
    counted = "ascent" if config.perturbation is not None and config.perturbation.ascent_fraction == 1.0 else "descent"
    for layer, of_layer in zip(layers, kept, strict=True):
        torch.testing.assert_close(of_layer[counted][0], layer.running_mean, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(of_layer[counted][1], layer.running_var, rtol=1e-3, atol=1e-4)
    result = {}
    for name in SETS:
        for layer, of_layer in zip(layers, kept, strict=True):
            assert layer.running_mean is not None
            assert layer.running_var is not None
            layer.running_mean.copy_(of_layer[name][0])
            layer.running_var.copy_(of_layer[name][1])
        val = components.val
        result[name] = evaluate(components.module, val, val.batches_everywhere, world, components.precision).top1
    return result


def table(lines: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Cells: mean and standard deviation by fraction and set, and the paired difference to the run's own set."""
    rows = []
    for fraction in sorted({line["fraction"] for line in lines}, reverse=True):
        of = [line for line in lines if line["fraction"] == fraction]
        counted = "ascent" if fraction == 1.0 else "descent"
        for name in SETS:
            top1 = np.array([line[name] for line in of])
            over = top1 - np.array([line[counted] for line in of])
            p = "" if name == counted or len(of) < 2 else f"{stats.ttest_1samp(over, 0.0).pvalue:.2f}"
            spread = f"{top1.std(ddof=1):.2f}" if len(of) > 1 else ""
            cells = [f"{fraction:g}", str(of[0]["rho"]), name + " (as trained)" * (name == counted), str(len(of))]
            rows.append([*cells, f"{top1.mean():.2f}", spread, f"{over.mean():+.2f}", p])
    return rows


HEAD = ["ascent on", "ρ", "statistics of", "seeds", "top-1", "sd", "over as trained", "p (paired t)"]


def main() -> None:
    """Measure what is missing, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the lines, and of what a run needs while it goes on")
    parser.add_argument("--config", type=Path, required=True, help="of the runs")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rho", type=float, nargs=3, default=[0.15, 0.6, 0.6], help="by fraction: 1, 1/8, 1/16")
    parser.add_argument("--output", type=Path, help="the Markdown file; a .json of the lines is written beside it")
    arguments, overrides = parser.parse_known_args()
    folder = arguments.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "lines.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    with join_world() as world:
        for seed, (fraction, rho) in product(range(arguments.seeds), zip(FRACTIONS, arguments.rho, strict=True)):
            key = {"fraction": fraction, "rho": rho, "seed": seed}
            if any(key.items() <= line.items() for line in lines):
                continue
            given = {"rho": rho, "mask": "null", "direction.fraction": fraction}
            plan = [f"perturbation.{name}={value}" for name, value in given.items()]
            top1 = one(arguments.config, [*overrides, *plan, f"train.seed={seed}"], folder, world)
            lines.append({**key, **top1})
            with file.open("a") as appended:
                appended.write(json.dumps(lines[-1]) + "\n")
    rows = table(lines)
    shown = Table(*HEAD)
    for cells in rows:
        shown.add_row(*cells)
    Console(width=120).print(shown)
    output = arguments.output or result_path(Path(__file__).parent / "results", "batchnorm-statistics")
    text = [
        "# BatchNorm's running statistics, by the pass that they are of",
        "",
        "No training step reads them: each run is evaluated with those of its ascents, of its descents, and of both.",
        "",
        *("| " + " | ".join(row) + " |" for row in (HEAD, ["---"] * len(HEAD), *rows)),
    ]
    write(output, text, lines, provenance())


if __name__ == "__main__":
    main()

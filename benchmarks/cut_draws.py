"""What moving cuts cost and reach, by how they are drawn: milliseconds of ascent and Fisher mass, expected of a step.

    python benchmarks/cut_draws.py resnet50 vit_small          the tables, written to benchmarks/results/ too
    python benchmarks/cut_draws.py vit_small --steps 0         at the initial weights

The network learns Fashion-MNIST (Debian's package dataset-fashion-mnist; random images where it is not installed) for
a few steps by SGD, at 96 pixels in batches of 8, because the Fisher mass of initial weights says little. Then ascents
are timed with the cut at each block, the Fisher mass of 64 images is measured, and each way of drawing gives its
expectation over them.
"""

from __future__ import annotations

import argparse
import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ssam_scale import AnnealedCut, Depth, DepthByCost, SparseSAM, ascent_seconds
from ssam_scale.bench.networks import Setting
from ssam_scale.bench.record import provenance, result_path, write
from ssam_scale.masks import suffix_sums

FOLDER = Path("/usr/share/datasets/fashion-mnist")
RESOLUTION, BATCH, SAMPLES, REPEATS, ANNEALED_STEPS = 96, 8, 64, 5, 1000


def images(count: int) -> tuple[Tensor, Tensor]:
    """The first of Fashion-MNIST, float32 (n, 3, 96, 96) of mean 0 and variance 1, and labels int64 (n,)."""
    if not FOLDER.exists():
        generator = torch.Generator().manual_seed(1)
        pixels = torch.randn(count, 3, RESOLUTION, RESOLUTION, generator=generator)
        return pixels, torch.randint(10, (count,), generator=generator)
    read = [gzip.decompress((FOLDER / f"train-{n}-ubyte.gz").read_bytes()) for n in ("images-idx3", "labels-idx1")]
    grey = torch.from_numpy(np.frombuffer(read[0], np.uint8, offset=16).copy())[: count * 784].view(count, 1, 28, 28)
    labels = torch.from_numpy(np.frombuffer(read[1], np.uint8, offset=8).copy())[:count].long()
    resized = F.interpolate((grey.float() / 255 - 0.286) / 0.353, (RESOLUTION, RESOLUTION), mode="bilinear")
    return resized.expand(-1, 3, -1, -1).contiguous(), labels


def expected(probabilities: Sequence[float], values: Sequence[float]) -> float:
    """Of a value by cut."""
    return sum(p * v for p, v in zip(probabilities, values, strict=True))


def measured(model: str, steps: int) -> tuple[list[float], list[float]]:
    """Seconds of the ascent, and Fisher mass of what is perturbed as a share of all, by cut."""
    network = Setting(model, RESOLUTION, BATCH, torch.device("cpu")).network()
    opt = SparseSAM(network, torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9), mask=DepthByCost())
    pixels, labels = images(max(SAMPLES, steps * BATCH))

    def loss_fn(forward: object, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(forward(batch[0]), batch[1])  # type: ignore[operator]

    for i in range(steps):
        loss = loss_fn(network, (pixels[i * BATCH : (i + 1) * BATCH], labels[i * BATCH : (i + 1) * BATCH]))
        loss.backward()
        opt.base_optimizer.step()
        opt.base_optimizer.zero_grad()
    assert isinstance(opt.mask, DepthByCost)
    opt.mask.seconds = seconds = ascent_seconds(opt, loss_fn, (pixels[:BATCH], labels[:BATCH]), repeats=REPEATS)
    opt.refresh(loss_fn, (pixels[:SAMPLES], labels[:SAMPLES]))
    assert opt.mask.masses is not None
    masses = suffix_sums(opt.mask.masses)
    return seconds, [m / masses[0] for m in masses]


def expectations(model: str, steps: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows by way of drawing the cut, and rows by cut."""
    seconds, masses = measured(model, steps)
    blocks = len(seconds)
    by_cost = DepthByCost(seconds=seconds)
    by_cost.masses = tuple(m - n for m, n in zip(masses, [*masses[1:], 0.0], strict=True))
    moving = Depth(AnnealedCut((0.0, 0.5), (0.5, 1.0), ANNEALED_STEPS))
    over_run = [moving.probabilities(blocks, step) for step in range(ANNEALED_STEPS)]
    ways = {
        "dense": [1.0] + [0.0] * (blocks - 1),
        "uniform": Depth().probabilities(blocks, 0),
        "annealed, [0, ½] → [½, 1]": [sum(column) / ANNEALED_STEPS for column in zip(*over_run, strict=True)],
        "cost": by_cost.probabilities(blocks, 0),
    }
    draws = []
    for draw, probabilities in ways.items():
        time, mass = expected(probabilities, seconds), expected(probabilities, masses)
        numbers = {"ascent_ms": 1e3 * time, "over_dense": time / seconds[0], "fisher_mass": mass}
        draws.append({"model": model, "draw": draw, **numbers, "mass_per_time": mass / time * seconds[0]})
    cuts = [
        {"model": model, "cut": cut, "ascent_ms": 1e3 * time, "fisher_mass": mass, "probability_by_cost": probability}
        for cut, (time, mass, probability) in enumerate(zip(seconds, masses, ways["cost"], strict=True))
    ]
    return draws, cuts


def shown(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Cells: numbers with three decimals, times in ms with one."""
    return [
        [f"{v:.1f}" if k.endswith("_ms") else f"{v:.3f}" if isinstance(v, float) else str(v) for k, v in row.items()]
        for row in rows
    ]


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="resnet50, vit_small or any model of timm's in stages")
    parser.add_argument("--steps", type=int, default=100, help="of training before anything is measured")
    parser.add_argument(
        "--output",
        type=Path,
        default=result_path(Path(__file__).parent / "results", "cut-draws"),
        help="the Markdown file; a .json of the raw rows is written beside it (default: %(default)s)",
    )
    arguments = parser.parse_args()
    console = Console(width=120)
    draws: list[dict[str, Any]] = []
    cuts: list[dict[str, Any]] = []
    for model in arguments.models:
        of_model = expectations(model, arguments.steps)
        for rows, more in zip((draws, cuts), of_model, strict=True):
            rows += more
            table = Table(*more[0], title=model)
            for cells in shown(more):
                table.add_row(*cells)
            console.print(table)
    text = [
        "# How a moving cut is drawn",
        "",
        "Expected time of an ascent and expected Fisher mass of the perturbed weights, for each way to draw the cut:",
        f"{RESOLUTION} pixels, batches of {BATCH}, fp32, {torch.get_num_threads()} thread(s), Fisher mass of {SAMPLES}",
        f"Fashion-MNIST images after {arguments.steps} steps of SGD, ascents timed at every cut ({REPEATS} times).",
        "",
        *("| " + " | ".join(row) + " |" for row in (list(draws[0]), ["---"] * len(draws[0]), *shown(draws))),
    ]
    write(arguments.output, text, [*draws, *cuts], provenance())


if __name__ == "__main__":
    main()

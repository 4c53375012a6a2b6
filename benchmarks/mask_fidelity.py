"""How much alike are the masks that different scores choose? Against the empirical Fisher of single samples.

    python benchmarks/mask_fidelity.py                    the tables, written to benchmarks/results/ too
    python benchmarks/mask_fidelity.py --seeds 5          over more runs

A small ResNet is trained on Fashion-MNIST (Debian's package dataset-fashion-mnist) by SGD, without SAM. After the first
and the last epoch all weights are scored, by single samples of the training images, and by what training left. Of each
score: the overlap, which is the share of the weights that the reference's mask perturbs and that the score's mask
perturbs as well, and Spearman's rank correlation of the scores of all weights.
"""

from __future__ import annotations

import argparse
import gzip
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ssam_scale.bench.record import provenance, result_path, write
from ssam_scale.models.torchvision_ops import ensure_torchvision
from ssam_scale.perturbation.scores import (
    AccumulatedFisher,
    per_sample_scores,
    random_scores,
    sampled_label_loss,
    weight_scores,
)
from ssam_scale.sharding import Sharding
from ssam_scale.sharding.place import sharding_of

FOLDER = Path("/usr/share/datasets/fashion-mnist")
CHANNELS, BATCH, LR, MOMENTUM, WEIGHT_DECAY = (16, 32, 48, 64), 128, 0.05, 0.9, 5e-4
SPARSITIES = (0.5, 0.9)
REFERENCES = ("Fisher, 1,024 samples", "Fisher, 128 samples")
OTHERS = "Fisher, 1,024 other samples"

Row = tuple[float, ...]


def read_idx(name: str, header: int) -> Tensor:
    """The bytes of an idx file behind its header, uint8 of shape (bytes,)."""
    return torch.from_numpy(
        np.frombuffer(gzip.decompress((FOLDER / name).read_bytes()), np.uint8, offset=header).copy()
    )


def fashion(part: str) -> tuple[Tensor, Tensor]:
    """Images, float32 (n, 1, 28, 28) of mean 0 and variance 1 over the training part, and labels, int64 (n,)."""
    images = read_idx(f"{part}-images-idx3-ubyte.gz", 16).reshape(-1, 1, 28, 28)
    return (images.float() / 255.0 - 0.286) / 0.353, read_idx(f"{part}-labels-idx1-ubyte.gz", 8).long()


def loss_fn(forward: Callable[..., Any], batch: Sequence[Tensor]) -> Tensor:
    """Mean cross-entropy."""
    return F.cross_entropy(forward(batch[0]), batch[1])


def scores_of(
    sharding: Sharding,
    optimizer: torch.optim.Optimizer,
    parameters: list[nn.Parameter],
    averages: dict[str, AccumulatedFisher],
    data: tuple[Tensor, Tensor],
    seed: int,
) -> tuple[dict[str, list[Tensor]], dict[str, float]]:
    """Every score by name, and the seconds that it took."""
    order = torch.randperm(len(data[0]), generator=torch.Generator().manual_seed(1000 + seed))
    first, other = ((data[0][i], data[1][i]) for i in (order[:1024], order[1024:2048]))
    scores: dict[str, list[Tensor]] = {}
    seconds: dict[str, float] = {}

    def by_samples(names: dict[Any, str], loss: Any, batch: Any, samples: int) -> None:
        start = time.perf_counter()
        found = per_sample_scores(
            sharding, optimizer, parameters, loss, [batch], kinds=list(names), samples=samples, seed=seed
        )
        for kind, name in names.items():
            scores[name] = found[kind]
            seconds[name] = time.perf_counter() - start

    by_samples({"fisher": REFERENCES[0], "gradient": "gradient, 1,024 samples"}, loss_fn, first, 1024)
    by_samples({"fisher": REFERENCES[1], "gradient": "gradient, 128 samples"}, loss_fn, first, 128)
    by_samples({"fisher": OTHERS}, loss_fn, other, 1024)
    by_samples({"fisher": "Fisher, sampled labels, 1,024 samples"}, sampled_label_loss, first, 1024)
    by_samples({"fisher": "Fisher, sampled labels, 128 samples"}, sampled_label_loss, first, 128)
    scores |= {name: list(average.scores) for name, average in averages.items()}
    scores["weight"] = weight_scores(sharding, parameters)
    scores["random"] = random_scores(sharding, parameters, seed)
    return scores, seconds


def ranks(scores: list[Tensor]) -> Tensor:
    """The rank of every weight by its score, float64 of shape (weights,); equal scores in the order of the weights."""
    flat = torch.cat([s.flatten() for s in scores])
    result = torch.empty(len(flat), dtype=torch.float64)
    result[flat.argsort(stable=True)] = torch.arange(len(flat), dtype=torch.float64)
    return result


def compare(scores: dict[str, list[Tensor]]) -> dict[str, Row]:
    """By name: overlap at each sparsity and rank correlation, with the first reference, then with the second."""
    order = {name: ranks(s) for name, s in scores.items()}
    rows = {}
    for name, mine in order.items():
        row: list[float] = []
        for reference in (order[r] for r in REFERENCES):
            for sparsity in SPARSITIES:
                k = int(len(mine) * (1.0 - sparsity))
                floor = len(mine) - k
                row.append(float(((mine >= floor) & (reference >= floor)).sum()) / k)
            row.append(float(torch.corrcoef(torch.stack((mine, reference)))[0, 1]))
        rows[name] = tuple(row)
    return rows


def run(
    seed: int, epochs: int, images: int, report: Callable[[str], None]
) -> tuple[list[dict[str, Row]], dict[str, float], list[float], int]:
    """One training: the rows after the first and the last epoch, seconds by score, both accuracies, the weights."""
    import timm

    torch.manual_seed(seed)
    model = timm.create_model("resnet10t", num_classes=10, in_chans=1, channels=CHANNELS, stem_width=16)
    train, test = fashion("train"), fashion("t10k")
    some = torch.randperm(len(train[0]))[:images]
    data = train[0][some], train[1][some]
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    steps = epochs * (images // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    sharding = sharding_of(model)
    averages = {
        f"squared batch gradients, decay {decay}": AccumulatedFisher(sharding, parameters, decay)
        for decay in (0.9, 0.99, 0.999)
    }
    results, seconds, accuracies = [], {}, []
    for epoch in range(epochs):
        model.train()
        for batch in torch.randperm(images).split(BATCH)[: images // BATCH]:
            optimizer.zero_grad()
            loss_fn(model, (data[0][batch], data[1][batch])).backward()
            for average in averages.values():
                average.update(sharding.gradients(parameters))
            optimizer.step()
            schedule.step()
        if epoch in (0, epochs - 1):
            model.eval()
            with torch.no_grad():
                right = sum(
                    int((model(x).argmax(1) == y).sum()) for x, y in zip(*(t.split(1000) for t in test), strict=True)
                )
            accuracies.append(100.0 * right / len(test[0]))
            model.train()
            scores, seconds = scores_of(sharding, optimizer, parameters, averages, data, seed)
            results.append(compare(scores))
            report(f"seed {seed}, epoch {epoch + 1}: top-1 {accuracies[-1]:.1f}")
    return results, seconds, accuracies, sum(p.numel() for p in parameters)


def cells(rows: list[Row]) -> list[str]:
    """Mean and standard deviation over runs of each column."""
    spread = [statistics.stdev(c) if len(rows) > 1 else 0.0 for c in zip(*rows, strict=True)]
    return [f"{statistics.mean(c):.2f} ± {s:.2f}" for c, s in zip(zip(*rows, strict=True), spread, strict=True)]


HEADER = [
    "score",
    *(
        f"{what}, {reference.removeprefix('Fisher, ')}"
        for reference in REFERENCES
        for what in (*(f"overlap at sparsity {s}" for s in SPARSITIES), "rank correlation")
    ),
]


def markdown(
    tables: list[tuple[str, list[list[str]]]], seconds: dict[str, float], options: argparse.Namespace, weights: int
) -> list[str]:
    """The tables and what was measured."""
    parts = [
        "# Masks by other scores than the Fisher score of single samples",
        "",
        f"ResNet-10-T of {weights:,} weights (channels {CHANNELS}) on {options.images:,} images of Fashion-MNIST, "
        f"{options.epochs} epochs of SGD",
        f"(batch {BATCH}, lr {LR} with cosine decay, momentum {MOMENTUM}, weight decay {WEIGHT_DECAY}), without SAM; "
        f"mean ± standard deviation over {options.seeds} seeds. The overlap is the share of the weights chosen by the",
        "reference that the score chooses as well: 0.50 and 0.10 by chance.",
        "References are the empirical Fisher score of 1,024 training samples and of the first 128 of them.",
        "",
    ]
    for title, rows in tables:
        parts += [f"## {title}", ""]
        parts += ["| " + " | ".join(row) + " |" for row in (HEADER, ["---"] * len(HEADER), *rows)]
        parts.append("")
    costs = ", ".join(f"{name}: {seconds[name]:.1f} s" for name in REFERENCES)
    threads = torch.get_num_threads()
    return [
        *parts,
        f"Time of one score in the last run, {threads} thread(s): {costs}.",
        "The averages, weight and random take no pass.",
    ]


def main() -> None:
    """Train, compare, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3, help="number of runs (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=5, help="at least 2 (default: %(default)s)")
    parser.add_argument("--images", type=int, default=8_000, help="training images (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: %(default)s)")
    parser.add_argument(
        "--output",
        type=Path,
        default=result_path(Path(__file__).parent / "results", "mask-fidelity"),
        help="the Markdown file; a .json of the raw rows is written beside it (default: %(default)s)",
    )
    options = parser.parse_args()
    if not FOLDER.is_dir():
        parser.error(f"{FOLDER} is missing: apt-get install dataset-fashion-mnist")
    if options.epochs < 2 or options.seeds < 1 or not 2048 <= options.images <= 60_000:
        parser.error("at least 2 epochs, 1 seed and 2,048 to 60,000 images are needed")
    ensure_torchvision()
    torch.set_num_threads(options.threads)
    console = Console()
    runs = [run(seed, options.epochs, options.images, console.print) for seed in range(options.seeds)]
    tables = []
    for point, epoch in enumerate((1, options.epochs)):
        accuracy = cells([(r[2][point],) for r in runs])[0]
        title = f"After epoch {epoch} (top-1 {accuracy}%)"
        rows = [[name, *cells([r[0][point][name] for r in runs])] for name in runs[0][0][point]]
        tables.append((title, rows))
        table = Table(*HEADER, title=title)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    raw = [
        {"seed": seed, "epoch": epoch, "top1": r[2][point], "score": name, **dict(zip(HEADER[1:], values, strict=True))}
        for seed, r in enumerate(runs)
        for point, epoch in enumerate((1, options.epochs))
        for name, values in r[0][point].items()
    ]
    write(options.output, markdown(tables, runs[-1][1], options, runs[0][3]), raw, provenance())


if __name__ == "__main__":
    main()

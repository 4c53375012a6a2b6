"""A model of one's own in stages: a transformer that reads the 28 rows of an image, and what a cut saves on it."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from fashion_mnist import batches
from torch import Tensor, nn

from ssam_scale import Depth, SparseSAM, Stage, StagedModel


class RowReader(nn.Module):
    """Any module with a chain of blocks will do."""

    def __init__(self, width: int = 96, depth: int = 6) -> None:
        super().__init__()
        self.embed = nn.Linear(28, width)
        self.position = nn.Parameter(0.02 * torch.randn(28, width))
        layer = {"dim_feedforward": 2 * width, "dropout": 0.1, "batch_first": True, "norm_first": True}
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(width, 4, **layer) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def before(self, x: Tensor) -> Tensor:
        """Images to tokens."""
        return self.embed(x.squeeze(1)) + self.position

    def after(self, x: Tensor) -> Tensor:
        """Tokens to logits."""
        return self.head(self.norm(x.mean(1)))

    def forward(self, x: Tensor) -> Tensor:
        """Images (n, 1, 28, 28) to logits (n, 10)."""
        x = self.before(x)
        for block in self.blocks:
            x = block(x)
        return self.after(x)


def in_stages(model: RowReader) -> StagedModel:
    """One stage a block; composed, the stages' forwards are the model's. Between any two of them there can be a cut.

    `owns` names what a stage uses beside its block; what no stage claims is counted to the first.
    """
    stages = [Stage(f"blocks.{i}", block, block) for i, block in enumerate(model.blocks)]
    first, last = model.blocks[0], model.blocks[-1]
    stages[0] = Stage("blocks.0", first, lambda x: first(model.before(x)), owns=("embed", "position"))
    stages[-1] = Stage(stages[-1].name, last, lambda x: model.after(last(x)), owns=("norm", "head"))
    return StagedModel(model, stages)


def loss_fn(forward: Callable[..., Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean loss of a batch."""
    return F.cross_entropy(forward(batch[0]), batch[1])


def optimizer(rho: float, mask: Depth | None = None) -> SparseSAM:
    """Around AdamW and a model that is the same each time."""
    torch.manual_seed(0)
    staged = in_stages(RowReader())
    return SparseSAM(staged, torch.optim.AdamW(staged.parameters(), lr=1e-3), rho=rho, mask=mask)


if __name__ == "__main__":
    plans = {"base": optimizer(0.0), "dense SAM": optimizer(0.05), "cut at 2/3": optimizer(0.05, Depth((2 / 3, 2 / 3)))}
    seconds: dict[str, list[float]] = {name: [] for name in plans}
    for batch in batches(8, 48):
        for name, opt in plans.items():  # in turns, so that what else the machine does falls on all of them
            started = time.perf_counter()
            opt.step(loss_fn, batch)
            seconds[name].append(time.perf_counter() - started)
    for name in plans:
        print(
            f"{name}: {min(seconds[name]) / min(seconds['base']):.2f} times a step of AdamW"
        )  # what disturbs one adds

"""Lightning: manual optimization, in which `training_step` hands the batch to SparseSAM.

python examples/lightning_loop.py

Lightning's automatic optimization passes a closure, which works, too, and pays for two full passes; not with
`accumulate_grad_batches`, of which the closure runs the last micro-batch only: SparseSAM says so.
"""

from __future__ import annotations

import ssam_scale.models  # noqa: F401 - makes torchvision, which the next ones import, importable beside a CPU torch

# isort: split
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from fashion_mnist import batches
from torch import Tensor, nn

from ssam_scale import Depth, SparseSAM, Stage, StagedModel


class Classifier(lightning.LightningModule):
    """Three stages, of which the last two are perturbed."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        model = nn.Sequential(
            nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU()),
            nn.Sequential(nn.Linear(64, 64), nn.ReLU()),
            nn.Linear(64, 10),
        )
        self.model = StagedModel(model, [Stage(str(i), block, block) for i, block in enumerate(model)])

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        """`use_pl_optimizer=False` is SparseSAM itself; `LightningOptimizer.step` takes no batches."""
        opt: Any = self.optimizers(use_pl_optimizer=False)
        loss = opt.step(lambda forward, batch: F.cross_entropy(forward(batch[0]), batch[1]), batch)
        self.print(f"loss {float(loss):.4f}")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Lightning calls it when the model is where it is trained."""
        sgd = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        return SparseSAM(self.model, sgd, rho=0.05, mask=Depth(1 / 3))


def main() -> None:
    """Four steps of 128 images."""
    lightning.seed_everything(0)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    loader = torch.utils.data.DataLoader(batches(4, 128), batch_size=None)  # type: ignore[arg-type]
    lightning.Trainer(max_epochs=1, accelerator="auto", devices=1, **quiet).fit(Classifier(), loader)


if __name__ == "__main__":
    main()

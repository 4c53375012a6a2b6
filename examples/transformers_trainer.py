"""Hugging Face's Trainer: both passes in `training_step`, the second one at the perturbed weights.

python examples/transformers_trainer.py

The Trainer clips the second pass's gradient and steps. It runs both passes itself, so that a mask saves no time here.
"""

from __future__ import annotations

import ssam_scale.models  # noqa: F401 - makes torchvision, which the next ones import, importable beside a CPU torch

# isort: split
import tempfile
from typing import Any

import torch
import torch.nn.functional as F
from fashion_mnist import batches
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from ssam_scale import SparseSAM


class Classifier(nn.Module):
    """Returns the loss, as the Trainer wants it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Logits and their mean loss."""
        logits = self.net(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class SAMTrainer(Trainer):
    """A Trainer whose optimizer is a SparseSAM."""

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *more: Any) -> Tensor:
        """The gradient at w, then the one at w + ε, which the Trainer steps by."""
        opt: SparseSAM = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate has wrapped it
        loss = super().training_step(model, dict(inputs), *more)
        with opt.perturbed():
            super().training_step(model, inputs, *more)
        print(f"loss {float(loss):.4f}")
        return loss


def main() -> None:
    """Four steps of 128 images."""
    torch.manual_seed(0)
    model = Classifier()
    opt = SparseSAM(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), rho=0.05)
    [(images, labels)] = batches(1, 512)
    data: Any = [{"x": x, "labels": y} for x, y in zip(images, labels, strict=True)]
    constant = torch.optim.lr_scheduler.ConstantLR(opt, factor=1.0)
    with tempfile.TemporaryDirectory() as folder:
        plan = TrainingArguments(
            folder, per_device_train_batch_size=128, num_train_epochs=1, report_to=[], save_strategy="no"
        )
        SAMTrainer(model=model, args=plan, train_dataset=data, optimizers=(opt, constant)).train()


if __name__ == "__main__":
    main()

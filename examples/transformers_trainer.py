"""Hugging Face's Trainer: the second passes, at the perturbed weights, in the step's last call of `training_step`.

python examples/transformers_trainer.py

With `gradient_accumulation_steps` the first passes of all micro-batches come before, so that both gradients are of all
of them, as with `opt.step(loss_fn, *micro_batches)`. The Trainer clips the second one (`max_grad_norm`) and steps. It
runs all passes itself, so that a mask saves no time here.
"""

from __future__ import annotations

import ssam_scale.models  # noqa: F401 - makes torchvision, which the next ones import, importable beside a CPU torch

# isort: split
import tempfile
from contextlib import nullcontext
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

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[tuple[dict[str, Any], Tensor]] = []  # the step's micro-batches so far, with their losses

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *more: Any) -> Tensor:
        """The gradient at w; after the last micro-batch the one at w + ε, which the Trainer steps by."""
        loss = super().training_step(model, dict(inputs), *more)
        self.seen.append((inputs, loss))
        if self.accelerator.sync_gradients:  # as it is in a step's last micro-batch
            seen, self.seen = self.seen, []
            opt: SparseSAM = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate has wrapped it
            with opt.perturbed():
                for place, (again, _) in enumerate(seen, start=1):
                    with self.accelerator.no_sync(model) if place < len(seen) else nullcontext():
                        super().training_step(model, dict(again), *more)
            print(f"loss {float(sum(loss for _, loss in seen)):.4f}")
        return loss


def main() -> None:
    """Four steps of two micro-batches of 64 images."""
    torch.manual_seed(0)
    model = Classifier()
    opt = SparseSAM(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), rho=0.05)
    [(images, labels)] = batches(1, 512)
    data: Any = [{"x": x, "labels": y} for x, y in zip(images, labels, strict=True)]
    constant = torch.optim.lr_scheduler.ConstantLR(opt, factor=1.0)
    with tempfile.TemporaryDirectory() as folder:
        micro: Any = {"per_device_train_batch_size": 64, "gradient_accumulation_steps": 2}
        plan = TrainingArguments(folder, num_train_epochs=1, report_to=[], save_strategy="no", **micro)
        SAMTrainer(model=model, args=plan, train_dataset=data, optimizers=(opt, constant)).train()


if __name__ == "__main__":
    main()

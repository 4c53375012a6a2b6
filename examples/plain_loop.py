"""SparseSAM in a plain loop: one process, a timm ResNet, a cut that moves. Each step pays for what it perturbs.

python examples/plain_loop.py
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from fashion_mnist import batches
from torch import Tensor

from ssam_scale import Depth, SparseSAM, StagedModel

try:
    from ssam_scale.models import stages_of  # before timm, which a CPU build of torch cannot import by itself

    import timm  # isort: skip
except ModuleNotFoundError as missing:
    raise SystemExit(f"{missing.name} is not installed: pip install '.[train]' brings it") from None

EPOCHS, STEPS, BATCH, TESTED = 2, 15, 64, 500


def loss_fn(forward: Callable[..., Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean loss of a batch: `forward` stands for the model. No backward here; `step` does that."""
    images, labels = batch
    return F.cross_entropy(forward(images), labels)


def main() -> None:
    """Train on the first images, test on others."""
    torch.manual_seed(0)
    network = timm.create_model("resnet18", in_chans=1, num_classes=10, channels=(8, 16, 24, 32), stem_width=8)
    model = StagedModel(network, stages_of(network))  # in stages, so that the part before a cut can be run once

    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    opt = SparseSAM(model, sgd, rho=0.1, mask=Depth())
    scheduler = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=EPOCHS * STEPS)  # opt is an optimizer

    train, test = batches(STEPS, BATCH), batches(1, TESTED, first=50_000)
    for epoch in range(EPOCHS):
        model.train()
        for batch in train:
            loss = opt.step(loss_fn, batch)
            scheduler.step()
        model.eval()
        with torch.no_grad():
            right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in test)
        print(f"epoch {epoch + 1}: loss {loss:.3f}, top-1 {100 * right / TESTED:.1f}%")

    torch.save({"model": network.state_dict(), "optimizer": opt.state_dict()}, "plain_loop.pt")  # enough to go on from


if __name__ == "__main__":
    main()

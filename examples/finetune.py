"""Fine-tuning with SAM behind a late cut: a new head, smaller learning rates for what is pretrained, a cheap ascent.

python examples/finetune.py

It trains its own weights first, on five kinds of clothes, and then fine-tunes them on the other five.
`timm.create_model(..., pretrained=True, num_classes=5)` begins with timm's: the rest stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from fashion_mnist import batches
from torch import Tensor, nn

from ssam_scale import Depth, SparseSAM, StagedModel

try:
    from ssam_scale.models import stages_of  # before timm, which a CPU build of torch cannot import by itself

    import timm  # isort: skip
except ModuleNotFoundError as missing:
    raise SystemExit(f"{missing.name} is not installed: pip install '.[train]' brings it") from None

EPOCHS, STEPS, BATCH, TESTED = 2, 12, 64, 1000


def of_classes(first: int, given: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """The images of five classes from `first` on, numbered from 0."""
    inside = [(y >= first) & (y < first + 5) for _, y in given]
    return [(x[here], y[here] - first) for (x, y), here in zip(given, inside, strict=True)]


def loss_fn(forward: Callable[..., Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean loss of a batch: `forward` stands for the model."""
    images, labels = batch
    return F.cross_entropy(forward(images), labels)


def train(network: nn.Module, rates: list[dict[str, object]], mask: Depth | None, classes: int) -> None:
    """Two epochs; prints the loss of each, and top-1 on other images."""
    model = StagedModel(network, stages_of(network))
    opt = SparseSAM(model, torch.optim.SGD(rates, momentum=0.9), rho=0.1, mask=mask)
    for epoch in range(EPOCHS):
        model.train()
        for batch in of_classes(classes, batches(STEPS, BATCH)):
            loss = opt.step(loss_fn, batch)
        model.eval()
        ((images, labels),) = of_classes(classes, batches(1, TESTED, first=50_000))
        with torch.no_grad():
            right = (network(images).argmax(1) == labels).float().mean()
        print(f"epoch {epoch + 1}: loss {loss:.3f}, top-1 {100 * right:.1f}%")


def main() -> None:
    """Pretrain, then fine-tune."""
    torch.manual_seed(0)
    network = timm.create_model("resnet18", in_chans=1, num_classes=5, channels=(8, 16, 24, 32), stem_width=8)
    print("pretraining on five classes, dense SAM")
    train(network, [{"params": network.parameters(), "lr": 0.1}], None, classes=0)

    network.reset_classifier(5)  # a new head; the rest learns at a tenth of its rate
    head = list(network.get_classifier().parameters())
    rest = [p for p in network.parameters() if all(p is not h for h in head)]
    print("fine-tuning on the other five, SAM of the blocks behind a cut in the later half")
    train(network, [{"params": rest, "lr": 0.01}, {"params": head, "lr": 0.1}], Depth(cut=(0.5, 1.0)), classes=5)
    torch.save(network.state_dict(), "finetuned.pt")


if __name__ == "__main__":
    main()

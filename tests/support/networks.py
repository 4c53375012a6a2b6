"""Small networks of the real families, and batches for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssam_scale.models import staged
from ssam_scale.perturbation import Stage, StagedModel

IMAGE, CLASSES = 32, 10


def small_network(family: str, seed: int = 0, **kwargs: Any) -> StagedModel:
    """A timm ResNet (8 blocks, BatchNorm), ConvNeXt (5 blocks) or ViT (4) of some 10,000 weights, in stages."""
    import timm

    torch.manual_seed(seed)
    if family == "resnet":
        model = timm.create_model("resnet18", num_classes=CLASSES, channels=(8, 8, 16, 24), stem_width=8, **kwargs)
    elif family == "convnext":
        kwargs = {"depths": (1, 1, 2, 1), "dims": (16, 16, 24, 32), "patch_size": 2, "ls_init_value": 0.5, **kwargs}
        model = timm.create_model("convnext_atto", num_classes=CLASSES, **kwargs)
    else:
        model = timm.create_model(
            "vit_tiny_patch16_224",
            num_classes=CLASSES,
            img_size=IMAGE,
            patch_size=8,
            embed_dim=32,
            depth=4,
            num_heads=2,
            **kwargs,
        )
    return staged(model)


def small_resnext() -> StagedModel:
    """Convolutions in groups, of which no rows can be computed alone, between others, of which they can."""
    import timm

    torch.manual_seed(0)
    network = timm.create_model(
        "resnext50_32x4d",
        layers=(1, 1, 1, 1),
        channels=(8, 8, 16, 16),
        cardinality=4,
        base_width=32,
        zero_init_last=False,
        num_classes=CLASSES,
        stem_width=8,
    )
    # Without dead units: a row of a gradient is zero only where it has not been computed.
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.ReLU):
            parent = network.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], nn.Tanh())
    return staged(network)


class TiedNetwork(nn.Module):
    """Its first and its last layer share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3 * IMAGE * IMAGE, 16)
        self.blocks = nn.ModuleList(nn.Linear(16, 16, bias=False) for _ in range(3))
        self.last = nn.Linear(16, 16, bias=False)
        self.head = nn.Linear(16, CLASSES)
        self.last.weight = self.blocks[0].weight

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x.flatten(1)))
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.head(torch.tanh(self.last(x)))


def tied_network() -> StagedModel:
    torch.manual_seed(0)
    network = TiedNetwork()

    def first(x: Tensor) -> Tensor:
        return torch.tanh(network.first(x.flatten(1)))

    def last(x: Tensor) -> Tensor:
        return network.head(torch.tanh(network.last(x)))

    def block(index: int) -> Callable[[Tensor], Tensor]:
        return lambda x: torch.tanh(network.blocks[index](x))

    blocks = [Stage(f"blocks.{i}", network.blocks[i], block(i)) for i in range(3)]
    return StagedModel(
        network, [Stage("first", network.first, first), *blocks, Stage("last", network.last, last, ("head",))]
    )


def freeze_batchnorm(model: nn.Module) -> nn.Module:
    """Training mode with BatchNorm in evaluation mode: the statistics of a batch depend on how it is split."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def batches(steps: int, size: int, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    """Global batches of images and labels, the same on every process."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, 3, IMAGE, IMAGE, generator=generator),
            torch.randint(CLASSES, (size,), generator=generator),
        )
        for _ in range(steps)
    ]


def loss_fn(forward: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross-entropy."""
    return F.cross_entropy(forward(batch[0]), batch[1])


def part(batch: tuple[Tensor, Tensor], index: int, of: int) -> tuple[Tensor, Tensor]:
    """The `index`-th of `of` equal parts of a batch."""
    return batch[0].chunk(of)[index], batch[1].chunk(of)[index]

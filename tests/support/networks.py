"""Small networks of the real families, and batches for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssam_scale.models import staged, stages_of
from ssam_scale.perturbation import Stage, StagedModel

IMAGE, CLASSES = 32, 10


def _timms(name: str, **fixed: Any) -> Callable[..., nn.Module]:
    """A timm model of few weights, of which arguments can be others."""

    def make(**kwargs: Any) -> nn.Module:
        import timm

        model: nn.Module = timm.create_model(name, **{"num_classes": CLASSES, **fixed, **kwargs})
        return model

    return make


def _mixer(**kwargs: Any) -> nn.Module:
    from timm.models import MlpMixer

    model: nn.Module = MlpMixer(CLASSES, IMAGE, patch_size=8, num_blocks=3, embed_dim=32, **kwargs)
    return model


def _torchvision_resnet(**kwargs: Any) -> nn.Module:
    from torchvision.models.resnet import BasicBlock, ResNet

    model: nn.Module = ResNet(BasicBlock, [2, 1, 1, 1], CLASSES, **kwargs)
    return model


def _torchvision_vit(**kwargs: Any) -> nn.Module:
    from torchvision.models import VisionTransformer

    size = {"image_size": IMAGE, "patch_size": 8, "num_layers": 3, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 64}
    model: nn.Module = VisionTransformer(**{**size, "num_classes": CLASSES, **kwargs})
    return model


_TRANSFORMER = {"img_size": IMAGE, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
_SWIN = {
    "img_size": IMAGE,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": (2, 2, 1),
    "num_heads": (1, 2, 2),
    "window_size": 4,
}
_DROPS = {"drop_rate": 0.3, "drop_path_rate": 0.3}

SMALL: dict[str, tuple[str, Callable[..., nn.Module], dict[str, Any]]] = {
    "resnet": ("ResNet", _timms("resnet18", channels=(8, 8, 16, 24), stem_width=8), _DROPS),
    "convnext": (
        "ConvNeXt",
        _timms("convnext_atto", depths=(1, 1, 2, 1), dims=(16, 16, 24, 32), patch_size=2, ls_init_value=0.5),
        {**_DROPS, "conv_mlp": True},
    ),
    "vit": ("VisionTransformer", _timms("vit_tiny_patch16_224", **{**_TRANSFORMER, "depth": 4}), _DROPS),
    "deit3": ("VisionTransformer", _timms("deit3_small_patch16_224", **_TRANSFORMER), {**_DROPS, "pos_drop_rate": 0.2}),
    "distilled": ("VisionTransformerDistilled", _timms("deit_tiny_distilled_patch16_224", **_TRANSFORMER), _DROPS),
    "efficientnet": ("EfficientNet", _timms("test_efficientnet"), _DROPS),
    "mobilenetv3": ("MobileNetV3", _timms("mobilenetv3_small_050"), _DROPS),
    "mobilenetv4": ("MobileNetV3", _timms("mobilenetv4_conv_small_050"), _DROPS),
    "regnet": ("RegNet", _timms("regnety_002", w0=8, wa=8.0, wm=2.0, depth=6, group_size=4), _DROPS),
    "regnet z": ("RegNet", _timms("regnetz_005", w0=8, wa=8.0, wm=2.0, depth=6, group_size=4), _DROPS),
    "swin": ("SwinTransformer", _timms("swin_tiny_patch4_window7_224", **_SWIN), _DROPS),
    "swinv2": ("SwinTransformerV2", _timms("swinv2_tiny_window8_256", **_SWIN), {**_DROPS, "attn_drop_rate": 0.2}),
    "mixer": ("MlpMixer", _mixer, {**_DROPS, "proj_drop_rate": 0.2}),
    "beit": ("Beit", _timms("beit_base_patch16_224", **_TRANSFORMER), _DROPS),
    "eva": ("Eva", _timms("eva_giant_patch14_224", **_TRANSFORMER, mlp_ratio=2), {**_DROPS, "patch_drop_rate": 0.3}),
    "eva02": ("Eva", _timms("eva02_tiny_patch14_224", **_TRANSFORMER), _DROPS),
    "dinov3": ("Eva", _timms("vit_tiny_patch16_dinov3_qkvb", **_TRANSFORMER), _DROPS),
    "maxvit": ("MaxxVit", _timms("test_maxvit", img_size=IMAGE), _DROPS),
    "coatnet": ("MaxxVit", _timms("test_coatnet", img_size=IMAGE), _DROPS),
    "torchvision resnet": ("torchvision.ResNet", _torchvision_resnet, {"zero_init_residual": True}),
    "torchvision vit": ("torchvision.VisionTransformer", _torchvision_vit, {"dropout": 0.2, "attention_dropout": 0.2}),
}
"""Of each family, by what it is called in tests: its class, how a small model is made, and what else it can be told."""


def small_network(family: str, seed: int = 0, **kwargs: Any) -> StagedModel:
    """A network of a known family in stages, of some 10,000 weights where the family allows it.

    Such as timm's ResNet (8 blocks, BatchNorm), ConvNeXt (5 blocks) and ViT (4).
    """
    torch.manual_seed(seed)
    _, make, _ = SMALL[family]
    return staged(make(**kwargs))


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


class NamedBlocks(nn.Module):
    """What no family knows: residual connections and weights of its own lie around blocks that a holder calls."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 24, 8, 8)
        self.trunk = Trunk()
        self.norm, self.head = nn.LayerNorm(24), nn.Linear(24, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.trunk(self.patches(images).flatten(2).mT)
        return self.head(self.norm(x).mean(1))


class Trunk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(16, 24) * 0.1)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 24)) for _ in range(4))
        self.scales = nn.ParameterList(torch.ones(24) for _ in self.blocks)
        self.norms = nn.ModuleList(nn.LayerNorm(24) for _ in self.blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.positions
        for block, norm, scale in zip(self.blocks, self.norms, self.scales, strict=True):
            x = x + scale * block(norm(x))
        return x


def network_by_names(seed: int = 0) -> StagedModel:
    """In stages by the names of its blocks; every stage has weights outside of its block."""
    torch.manual_seed(seed)
    model = NamedBlocks()
    return StagedModel(
        model, stages_of(model, [f"trunk.blocks.{i}" for i in range(4)], images=torch.randn(2, 3, IMAGE, IMAGE))
    )


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

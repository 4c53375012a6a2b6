"""EfficientNets, V2 too, and what timm builds with their class: MobileNetV2, MnasNet, MixNet, TinyNet."""

from __future__ import annotations

from timm.models.efficientnet import EfficientNet

from ssam_scale.models.stages import blocks_of, register_family, with_ends
from ssam_scale.perturbation.staged_model import Stage


@register_family(
    EfficientNet,
    "a stage for each inverted residual block",
    "arXiv 1905.11946",
    modules=("efficientnet",),
)
def efficientnet_stages(model: EfficientNet) -> list[Stage]:
    """A stage for each block."""
    blocks = blocks_of((f"blocks.{i}", layer) for i, layer in enumerate(model.blocks))
    head = [model.conv_head, model.bn2, model.forward_head]
    return with_ends(blocks, [model.conv_stem, model.bn1], head, ("conv_head", "bn2", "classifier"))

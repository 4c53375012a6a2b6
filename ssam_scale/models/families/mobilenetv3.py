"""MobileNetV3 and what timm builds with its class: MobileNetV4, FBNetV3, LCNet, HardCoRe-NAS."""

from __future__ import annotations

from timm.models.mobilenetv3 import MobileNetV3

from ssam_scale.models.stages import blocks_of, register_family, with_ends
from ssam_scale.perturbation.staged_model import Stage


@register_family(
    MobileNetV3,
    "a stage for each inverted residual block",
    "arXiv 1905.02244",
    modules=("mobilenetv3", "hardcorenas"),
)
def mobilenetv3_stages(model: MobileNetV3) -> list[Stage]:
    """A stage for each block; the convolution behind the pooling belongs to the last."""
    blocks = blocks_of((f"blocks.{i}", layer) for i, layer in enumerate(model.blocks))
    head_owns = ("conv_head", "norm_head", "classifier")
    return with_ends(blocks, [model.conv_stem, model.bn1], [model.forward_head], head_owns)

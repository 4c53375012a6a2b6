"""ResNets and what timm builds with their class: ResNeXt, Wide and SE-ResNets, Res2Net, ResNeSt, SKNet."""

from __future__ import annotations

from timm.models.resnet import ResNet

from ssam_scale.models.stages import blocks_of, register_family, with_ends
from ssam_scale.perturbation.staged_model import Stage


@register_family(
    ResNet,
    "a stage for each residual block (basic or bottleneck)",
    "arXiv 1512.03385",
    modules=("resnet", "res2net", "resnest", "sknet"),
)
def resnet_stages(model: ResNet) -> list[Stage]:
    """A stage for each block."""
    blocks = blocks_of((f"layer{i}", getattr(model, f"layer{i}")) for i in range(1, 5))
    stem = [model.conv1, model.bn1, model.act1, model.maxpool]
    return with_ends(blocks, stem, [model.forward_head], ("fc",))

"""MaxViT and what timm builds with its class: CoAtNet, MaxxViT."""

from __future__ import annotations

from timm.models.maxxvit import MaxxVit

from ssam_scale.models.stages import blocks_of, register_family, with_ends
from ssam_scale.perturbation.staged_model import Stage


@register_family(
    MaxxVit,
    "a stage for each block, of MaxViT a convolution with its two attentions",
    "arXiv 2204.01697",
    modules=("maxxvit",),
)
def maxvit_stages(model: MaxxVit) -> list[Stage]:
    """A stage for each block."""
    blocks = blocks_of((f"stages.{i}.blocks", layer.blocks) for i, layer in enumerate(model.stages))
    return with_ends(blocks, [model.stem], [model.norm, model.forward_head], ("norm", "head"))

"""Vision transformers and what timm builds with their class: DeiT, hybrids with a convolutional stem, ViTamin."""

from __future__ import annotations

from timm.models.vision_transformer import VisionTransformer

from ssam_scale.models.stages import register_family, with_ends
from ssam_scale.perturbation.staged_model import Stage


@register_family(
    VisionTransformer,
    "a stage for each transformer block",
    "arXiv 2010.11929",
    modules=("vision_transformer", "vision_transformer_hybrid", "deit", "vitamin"),
    exclude=("*distilled*",),  # of a subclass with two heads
)
def vision_transformer_stages(model: VisionTransformer) -> list[Stage]:
    """A stage for each block."""
    stem = [model.patch_embed, model._pos_embed, model.patch_drop, model.norm_pre]
    blocks = [(f"blocks.{i}", block) for i, block in enumerate(model.blocks)]
    return with_ends(blocks, stem, [model.norm, model.forward_head], ("norm", "attn_pool", "fc_norm", "head"))

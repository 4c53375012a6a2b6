"""Vision transformers and what timm builds with their classes: DeiT and DeiT III, hybrids, ViTamin; distilled DeiT."""

from __future__ import annotations

from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer

from ssam_scale.models.stages import blocks_of, register_family, with_ends
from ssam_scale.perturbation.staged_model import Stage


@register_family(
    VisionTransformer,
    "a stage for each transformer block",
    "arXiv 2010.11929",
    modules=("vision_transformer", "vision_transformer_hybrid", "deit", "vitamin"),
    exclude=("*distilled*",),
)
@register_family(
    VisionTransformerDistilled,
    "a stage for each transformer block, both heads with the last",
    "arXiv 2012.12877",
    modules=("deit",),
    include=("*distilled*",),
)
def vision_transformer_stages(model: VisionTransformer) -> list[Stage]:
    """A stage for each block."""
    stem = [model.patch_embed, model._pos_embed, model.patch_drop, model.norm_pre]
    head_owns = ("norm", "attn_pool", "fc_norm", "head", "head_dist")
    return with_ends(blocks_of([("blocks", model.blocks)]), stem, [model.norm, model.forward_head], head_owns)

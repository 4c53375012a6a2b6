"""Swin and Swin V2."""

from __future__ import annotations

from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2

from ssam_scale.models.stages import downsampled, register_family, with_ends
from ssam_scale.perturbation.staged_model import Stage


@register_family(
    SwinTransformer,
    "a stage for each block of shifted windows, the patch merging with the first of its resolution",
    "arXiv 2103.14030",
    modules=("swin_transformer",),
)
@register_family(
    SwinTransformerV2,
    "a stage for each block of shifted windows, the patch merging with the first of its resolution",
    "arXiv 2111.09883",
    modules=("swin_transformer_v2",),
)
def swin_stages(model: SwinTransformer | SwinTransformerV2) -> list[Stage]:
    """A stage for each block."""
    blocks, between = downsampled("layers", model.layers)
    head = [model.norm, model.forward_head]
    return with_ends(blocks, [model.patch_embed], head, ("norm", "head"), between=between)

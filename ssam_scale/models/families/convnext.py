"""ConvNeXt and ConvNeXt V2."""

from __future__ import annotations

from timm.models.convnext import ConvNeXt

from ssam_scale.models.stages import downsampled, register_family, with_ends
from ssam_scale.perturbation.staged_model import Stage


@register_family(
    ConvNeXt,
    "a stage for each ConvNeXt block, the downsampling with the first of its resolution",
    "arXiv 2201.03545",
    modules=("convnext",),
)
def convnext_stages(model: ConvNeXt) -> list[Stage]:
    """A stage for each block."""
    blocks, between = downsampled("stages", model.stages)
    head = [model.norm_pre, model.forward_head]
    return with_ends(blocks, [model.stem], head, ("norm_pre", "head"), between=between)

"""ConvNeXt and ConvNeXt V2."""

from __future__ import annotations

from timm.models.convnext import ConvNeXt

from ssam_scale.models.stages import around, register_family
from ssam_scale.perturbation.staged_model import Stage


@register_family(
    ConvNeXt,
    "a stage for each ConvNeXt block, the downsampling with the first of its resolution",
    "arXiv 2201.03545",
    modules=("convnext",),
)
def convnext_stages(model: ConvNeXt) -> list[Stage]:
    """A stage for each block."""
    stages = []
    ends = len(model.stages) - 1
    for i, stage in enumerate(model.stages):
        for j, block in enumerate(stage.blocks):
            first, last = j == 0, i == ends and j == len(stage.blocks) - 1
            # What makes a stage's feature maps smaller goes with its first block.
            before = [*([model.stem] if i == 0 else []), stage.downsample] if first else []
            owns = [*([f"stages.{i}.downsample"] if first else []), *(["norm_pre", "head"] if last else [])]
            after = [model.norm_pre, model.forward_head] if last else []
            forward = around(block, before=before, after=after)
            stages.append(Stage(f"stages.{i}.blocks.{j}", block, forward, tuple(owns)))
    return stages

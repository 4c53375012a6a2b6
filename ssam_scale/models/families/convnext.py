"""ConvNeXt and ConvNeXt V2."""

from __future__ import annotations

from dataclasses import replace

from timm.models.convnext import ConvNeXt

from ssam_scale.models.stages import chain, register_family
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
    for i, stage in enumerate(model.stages):
        for j, block in enumerate(stage.blocks):
            # What makes a stage's feature maps smaller goes with its first block.
            before, owns = ([stage.downsample], (f"stages.{i}.downsample",)) if j == 0 else ([], ())
            stages.append(Stage(f"stages.{i}.blocks.{j}", block, chain(*before, block), owns))
    first, last = stages[0], stages[-1]
    stages[0] = replace(first, forward=chain(model.stem, first.forward))
    head = chain(stages[-1].forward, model.norm_pre, model.forward_head)
    stages[-1] = replace(stages[-1], forward=head, owns=(*last.owns, "norm_pre", "head"))
    return stages

"""RegNet X, Y, Z and V."""

from __future__ import annotations

from timm.models.regnet import RegNet

from ssam_scale.models.stages import blocks_of, register_family, with_ends
from ssam_scale.perturbation.staged_model import Stage


@register_family(RegNet, "a stage for each bottleneck block", "arXiv 2003.13678", modules=("regnet",))
def regnet_stages(model: RegNet) -> list[Stage]:
    """A stage for each block."""
    blocks = blocks_of((f"s{i}", getattr(model, f"s{i}")) for i in range(1, 5))
    return with_ends(blocks, [model.stem], [model.final_conv, model.forward_head], ("final_conv", "head"))

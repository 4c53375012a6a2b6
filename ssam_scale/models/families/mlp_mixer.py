"""MLP-Mixer and what timm builds with its class: ResMLP, gMLP."""

from __future__ import annotations

from timm.models.mlp_mixer import MlpMixer

from ssam_scale.models.stages import blocks_of, register_family, with_ends
from ssam_scale.perturbation.staged_model import Stage


@register_family(MlpMixer, "a stage for each mixer block", "arXiv 2105.01601", modules=("mlp_mixer",))
def mlp_mixer_stages(model: MlpMixer) -> list[Stage]:
    """A stage for each block."""
    head = [model.norm, model.forward_head]
    return with_ends(blocks_of([("blocks", model.blocks)]), [model.stem], head, ("norm", "head"))

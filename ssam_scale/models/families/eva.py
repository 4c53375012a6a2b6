"""EVA, EVA-02 and what timm builds with their class: DINOv3, Perception Encoder, RoPE-ViT with axial positions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

from timm.models.eva import Eva
from torch import Tensor

from ssam_scale.errors import UserError
from ssam_scale.models.stages import blocks_of, register_family, with_ends
from ssam_scale.perturbation.staged_model import Stage


@register_family(Eva, "a stage for each transformer block", "arXiv 2211.07636", modules=("eva",))
def eva_stages(model: Eva) -> list[Stage]:
    """A stage for each block; where positions are rotary, each asks for them itself.

    Raises:
        UserError: rotary positions are trained, or drawn in each forward, and all blocks have to see the same ones.
    """
    blocks = blocks_of([("blocks", model.blocks)])
    if model.rope is not None:
        if model.rope_mixed:
            raise UserError("its blocks share one parameter of rotary positions; use another rope_type than mixed")
        if model.rope.aug_active:
            raise UserError(
                "its rotary positions are drawn anew for all blocks in each forward; set rope_shift_coords, "
                "rope_jitter_coords and rope_rescale_coords to null"
            )
        if model.patch_drop is not None:
            raise UserError("all its blocks see positions of the patches that are kept; leave patch_drop_rate out")
    positions = {} if model.rope is None else {name: _Positions(model) for name, _ in blocks}
    head, head_owns = [model.norm, model.forward_head], ("norm", "attn_pool", "fc_norm", "head")
    return with_ends(blocks, [partial(_tokens, model)], head, head_owns, keywords=positions)


def _tokens(model: Eva, images: Tensor) -> Tensor:
    """Patches behind the prefix tokens, with absolute positions where there are some.

    Raises:
        RuntimeError: their grid is not square, and has to be known behind a cut, too, where there are only tokens.
    """
    patches = model.patch_embed(images)
    if model.rope is not None and model.dynamic_img_size and patches.shape[1] != patches.shape[2]:
        raise RuntimeError(f"the stages of an Eva that takes any size need square images, not {tuple(images.shape)}")
    tokens, _ = model._pos_embed(patches)
    embedded: Tensor = model.norm_pre(tokens)
    return embedded


@dataclass(frozen=True)
class _Positions:
    """What each block is called with: the rotary positions of the patches."""

    model: Eva

    def __call__(self, tokens: Tensor) -> dict[str, Any]:
        """Of all tokens behind the prefix, which are a square where the size of images is not fixed."""
        rope = self.model.rope
        if self.model.dynamic_img_size:
            side = math.isqrt(tokens.shape[1] - self.model.num_prefix_tokens)
            return {"rope": rope.get_embed(shape=[side, side])}
        if hasattr(rope, "feat_shape"):
            return {"rope": rope.get_embed()}
        return {"rope": rope.get_embed(shape=self.model.patch_embed.grid_size)}

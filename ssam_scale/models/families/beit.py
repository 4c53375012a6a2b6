"""BEiT and BEiT v2."""

from __future__ import annotations

from functools import partial

import torch
from timm.models.beit import Beit
from torch import Tensor

from ssam_scale.errors import UserError
from ssam_scale.models.stages import blocks_of, register_family, with_ends
from ssam_scale.perturbation.staged_model import Stage


@register_family(Beit, "a stage for each transformer block", "arXiv 2106.08254", modules=("beit",))
def beit_stages(model: Beit) -> list[Stage]:
    """A stage for each block.

    Raises:
        UserError: all blocks share a bias, which no single stage could own.
    """
    if model.rel_pos_bias is not None:
        raise UserError("its blocks share one relative position bias; leave use_shared_rel_pos_bias out")
    head = [model.norm, model.forward_head]
    head_owns = ("norm", "fc_norm", "head")
    return with_ends(blocks_of([("blocks", model.blocks)]), [partial(_tokens, model)], head, head_owns)


def _tokens(model: Beit, images: Tensor) -> Tensor:
    """Patches behind the class token, with their positions."""
    patches = model.patch_embed(images)
    x = torch.cat([model.cls_token.expand(len(patches), -1, -1), patches], dim=1)
    embedded: Tensor = model.pos_drop(x if model.pos_embed is None else x + model.pos_embed)
    return embedded

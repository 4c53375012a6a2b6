"""torchvision's vision transformers."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torchvision.models import VisionTransformer

from ssam_scale.models.stages import blocks_of, register_family, with_ends
from ssam_scale.perturbation.staged_model import Stage


@register_family(VisionTransformer, "a stage for each transformer block", "arXiv 2010.11929")
def vision_transformer_stages(model: VisionTransformer) -> list[Stage]:
    """A stage for each block."""
    blocks = blocks_of([("encoder.layers", model.encoder.layers)])
    return with_ends(blocks, [partial(_tokens, model)], [partial(_logits, model)], ("encoder.ln", "heads"))


def _tokens(model: VisionTransformer, images: Tensor) -> Tensor:
    """Patches behind the class token, with their positions."""
    patches = model._process_input(images)
    x = torch.cat([model.class_token.expand(len(patches), -1, -1), patches], dim=1)
    embedded: Tensor = model.encoder.dropout(x + model.encoder.pos_embedding)
    return embedded


def _logits(model: VisionTransformer, tokens: Tensor) -> Tensor:
    """By the class token; with the heads that the model has when it is called."""
    logits: Tensor = model.heads(model.encoder.ln(tokens)[:, 0])
    return logits

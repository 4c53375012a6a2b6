"""The stages of timm's families: one residual, transformer or ConvNeXt block each.

What comes before the first block (stem, embeddings) belongs to the first stage, what comes after the last (norm,
pooling, head) to the last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from timm.models.convnext import ConvNeXt
from timm.models.resnet import ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ssam_scale.errors import UserError
from ssam_scale.perturbation.staged_model import Stage, StagedModel


@dataclass(frozen=True)
class _Chain:
    """Functions in sequence; an object rather than a closure, so that a deep copy of a model calls its own modules."""

    functions: tuple[Callable[[Tensor], Tensor], ...]

    def __call__(self, x: Tensor) -> Tensor:
        for function in self.functions:
            x = function(x)
        return x


def _chain(*functions: Callable[[Tensor], Tensor]) -> _Chain:
    return _Chain(functions)


def _with_ends(
    blocks: Sequence[tuple[str, nn.Module]],
    stem: Callable[[Tensor], Tensor],
    head: Callable[[Tensor], Tensor],
    head_owns: tuple[str, ...],
) -> list[Stage]:
    last = len(blocks) - 1
    return [
        Stage(
            name,
            block,
            _chain(*([stem] if i == 0 else []), block, *([head] if i == last else [])),
            head_owns if i == last else (),
        )
        for i, (name, block) in enumerate(blocks)
    ]


def _resnet_stages(model: ResNet) -> list[Stage]:
    stem = _chain(model.conv1, model.bn1, model.act1, model.maxpool)
    layers = ((f"layer{i}", getattr(model, f"layer{i}")) for i in range(1, 5))
    blocks = [(f"{name}.{j}", block) for name, layer in layers for j, block in enumerate(layer)]
    return _with_ends(blocks, stem, model.forward_head, ("fc",))


def _vision_transformer_stages(model: VisionTransformer) -> list[Stage]:
    stem = _chain(model.patch_embed, model._pos_embed, model.patch_drop, model.norm_pre)
    blocks = [(f"blocks.{i}", block) for i, block in enumerate(model.blocks)]
    head = _chain(model.norm, model.forward_head)
    return _with_ends(blocks, stem, head, ("norm", "attn_pool", "fc_norm", "head"))


def _convnext_stages(model: ConvNeXt) -> list[Stage]:
    stages = []
    for i, stage in enumerate(model.stages):
        for j, block in enumerate(stage.blocks):
            # What makes a stage's feature maps smaller goes with its first block.
            before, owns = ([stage.downsample], (f"stages.{i}.downsample",)) if j == 0 else ([], ())
            stages.append(Stage(f"stages.{i}.blocks.{j}", block, _chain(*before, block), owns))
    first, last = stages[0], stages[-1]
    stages[0] = replace(first, forward=_chain(model.stem, first.forward))
    head = _chain(stages[-1].forward, model.norm_pre, model.forward_head)
    stages[-1] = replace(stages[-1], forward=head, owns=(*last.owns, "norm_pre", "head"))
    return stages


_FAMILIES: dict[type[nn.Module], Callable[..., list[Stage]]] = {
    ResNet: _resnet_stages,
    VisionTransformer: _vision_transformer_stages,
    ConvNeXt: _convnext_stages,
}


def stages_of(model: nn.Module) -> list[Stage]:
    """The stages of a timm model: one per residual or transformer block.

    Raises:
        UserError: the model's family is not known here; stages of your own make a `StagedModel` all the same.
    """
    make = _FAMILIES.get(type(model))
    if make is None:
        known = ", ".join(family.__name__ for family in _FAMILIES)
        raise UserError(
            f"{type(model).__name__} has no stages: the patterns depth and block work on {known} and on a "
            "StagedModel built from stages of your own; the others work on any model"
        )
    return make(model)


def staged(model: nn.Module) -> StagedModel:
    """`model` in stages where its family is known, else as one single stage (which cannot be cut)."""
    if type(model) in _FAMILIES:
        return StagedModel(model, stages_of(model))
    return StagedModel(model, [Stage("", model, model.__call__)])

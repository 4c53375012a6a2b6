"""timm models in stages, one residual, transformer or ConvNeXt block each: `families/` has a file for each family.

What comes before the first block (stem, embeddings) belongs to the first stage, what comes after the last (norm,
pooling, head) to the last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import timm
import torch
from torch import Tensor, nn

from ssam_scale.errors import UserError
from ssam_scale.perturbation.staged_model import Stage, StagedModel
from ssam_scale.registry import Registry


@dataclass(frozen=True)
class Family:
    """The timm models of one class.

    Attributes:
        cls: the class; not its subclasses, whose forward may be another.
        stages: makes the stages of a model of it.
        modules: those of `timm.models` that build models of this class.
        exclude: wildcards of the names of models in these modules that are of another class.
    """

    cls: type[nn.Module]
    stages: Callable[[Any], list[Stage]]
    modules: tuple[str, ...]
    exclude: tuple[str, ...]

    def models(self, word: str = "") -> list[str]:
        """Names of its models in timm's registry, of those that contain `word`."""
        found: list[str] = []
        for module in self.modules:
            found += timm.list_models(f"*{word}*", module=module, exclude_filters=list(self.exclude))
        return sorted(found)


FAMILIES: Registry[Family] = Registry("ssam_scale.models.families")
"""By the name of timm's class."""

MakeStages = Callable[[Any], list[Stage]]


def register_family(
    cls: type[nn.Module], summary: str, paper: str, *, modules: tuple[str, ...], exclude: tuple[str, ...] = ()
) -> Callable[[MakeStages], MakeStages]:
    """A decorator of the function that makes the stages of a model.

    Args:
        cls: timm's class.
        summary: what a stage is, in one line.
        paper: of the architecture.
        modules: see `Family`.
        exclude: see `Family`.
    """

    def decorate(stages: MakeStages) -> MakeStages:
        FAMILIES.register(cls.__name__, summary, paper)(Family(cls, stages, modules, exclude))
        return stages

    return decorate


Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Chain:
    """Functions in sequence; an object rather than a closure, so that a deep copy of a model calls its own modules."""

    functions: tuple[Function, ...]

    def __call__(self, x: Tensor) -> Tensor:
        for function in self.functions:
            x = function(x)
        return x


@dataclass(frozen=True)
class _AroundBlock:
    """The forward of a stage: what runs before its block, the block, and what runs after it."""

    before: Function
    block: nn.Module
    after: Function

    def __call__(self, x: Tensor) -> Tensor:
        return self.after(self.block(self.before(x)))

    def compiled(self, **options: Any) -> Function:
        """The same with both ends compiled; the block is a module, and compiled as one."""
        return replace(self, before=_compiled(self.before, options), after=_compiled(self.after, options))


def _compiled(part: Function, options: dict[str, Any]) -> Function:
    return part if part == _Chain(()) else torch.compile(part, **options)


def around(block: nn.Module, *, before: Sequence[Function] = (), after: Sequence[Function] = ()) -> _AroundBlock:
    """The forward of a stage that is not its block alone.

    Args:
        block: the stage's.
        before: run before it, in sequence.
        after: run after it.
    """
    return _AroundBlock(_Chain(tuple(before)), block, _Chain(tuple(after)))


def with_ends(
    blocks: Sequence[tuple[str, nn.Module]],
    stem: Sequence[Function],
    head: Sequence[Function],
    head_owns: tuple[str, ...],
) -> list[Stage]:
    """A stage for each block; the first runs the stem before it, the last the head after it.

    Args:
        blocks: by name, in order.
        stem: from images to what the first block takes.
        head: from what the last block returns to logits.
        head_owns: prefixes of the names of the head's parameters.
    """
    last = len(blocks) - 1
    return [
        Stage(
            name,
            block,
            around(block, before=stem if i == 0 else (), after=head if i == last else ()),
            head_owns if i == last else (),
        )
        for i, (name, block) in enumerate(blocks)
    ]


_OF_MASKS = "the patterns depth and block work"


def stages_of(model: nn.Module, what: str = _OF_MASKS) -> list[Stage]:
    """The stages of a timm model: one per residual or transformer block.

    Args:
        model: timm's.
        what: needs them, in the words of the error.

    Raises:
        UserError: the model's family is not known here; stages of your own make a `StagedModel` all the same.
    """
    family = _family_of(model)
    if family is None:
        module = type(model).__module__.partition(".")[0]
        whose = f"{module}'s " if module != "timm" and type(model).__name__ in FAMILIES else ""
        others = "; element, row, tensor, nm, norm and named work on any model" if what == _OF_MASKS else ""
        raise UserError(
            f"{whose}{type(model).__name__} has no stages: {what} on timm's {', '.join(sorted(FAMILIES))}, and in "
            f"Python on a StagedModel built from stages of your own{others}"
        )
    return family.stages(model)


def staged(model: nn.Module) -> StagedModel:
    """`model` in stages where its family is known, else as one single stage (which cannot be cut)."""
    family = _family_of(model)
    return StagedModel(model, [Stage("", model, model.__call__)] if family is None else family.stages(model))


def _family_of(model: nn.Module) -> Family | None:
    return next((entry.value for entry in FAMILIES.values() if type(model) is entry.value.cls), None)

"""Models in stages, one residual, transformer or ConvNeXt block each: `families/` has a file for each family.

What comes before the first block (stem, embeddings) belongs to the first stage, what comes after the last (norm,
pooling, head) to the last. Models of no family are traced, block by block (`named_stages`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from itertools import groupby
from typing import Any

import timm
import torch
from torch import Tensor, nn

from ssam_scale.errors import UserError
from ssam_scale.perturbation.staged_model import Stage, StagedModel
from ssam_scale.registry import Registry

from .named_stages import IMAGES, named_stages


@dataclass(frozen=True)
class Family:
    """The models of one class.

    Attributes:
        cls: the class; not its subclasses, whose forward may be another.
        stages: makes the stages of a model of it.
        modules: those of `timm.models` that build models of this class; none of torchvision's classes.
        include: wildcards of the names of models in these modules that are of this class.
        exclude: wildcards of those that are of another.
    """

    cls: type[nn.Module]
    stages: Callable[[Any], list[Stage]]
    modules: tuple[str, ...] = ()
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def models(self, word: str = "") -> list[str]:
        """Names of its models in timm's registry, of those that contain `word`."""
        found: list[str] = []
        for module in self.modules:
            found += timm.list_models(f"*{word}*", module=module, exclude_filters=list(self.exclude))
        return sorted(name for name in found if any(fnmatch(name, wildcard) for wildcard in self.include))


FAMILIES: Registry[Family] = Registry("ssam_scale.models.families")
"""By the name of timm's class; of another library's by `library.Class`."""

MakeStages = Callable[[Any], list[Stage]]


def register_family(
    cls: type[nn.Module],
    summary: str,
    paper: str,
    *,
    modules: tuple[str, ...] = (),
    include: tuple[str, ...] = ("*",),
    exclude: tuple[str, ...] = (),
) -> Callable[[MakeStages], MakeStages]:
    """A decorator of the function that makes the stages of a model.

    The function raises `UserError` for a model whose arguments make something else of it than a sequence of blocks.

    Args:
        cls: timm's or torchvision's class.
        summary: what a stage is, in one line.
        paper: of the architecture.
        modules: see `Family`.
        include: see `Family`.
        exclude: see `Family`.
    """
    library = cls.__module__.partition(".")[0]
    name = cls.__name__ if library == "timm" else f"{library}.{cls.__name__}"

    def decorate(stages: MakeStages) -> MakeStages:
        FAMILIES.register(name, summary, paper)(Family(cls, stages, modules, include, exclude))
        return stages

    return decorate


Function = Callable[[Tensor], Tensor]
Keywords = Callable[[Tensor], dict[str, Any]]


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
    keywords: Keywords | None = None

    def __call__(self, x: Tensor) -> Tensor:
        x = self.before(x)
        return self.after(self.block(x, **({} if self.keywords is None else self.keywords(x))))

    def compiled(self, **options: Any) -> Function:
        """The same with both ends compiled; the block is a module, and compiled as one."""
        return replace(self, before=_compiled(self.before, options), after=_compiled(self.after, options))


def _compiled(part: Function, options: dict[str, Any]) -> Function:
    return part if part == _Chain(()) else torch.compile(part, **options)


def around(
    block: nn.Module,
    *,
    before: Sequence[Function] = (),
    after: Sequence[Function] = (),
    keywords: Keywords | None = None,
) -> _AroundBlock:
    """The forward of a stage that is not its block alone.

    Args:
        block: the stage's.
        before: run before it, in sequence.
        after: run after it.
        keywords: what the block is called with beside its input, by that input.
    """
    return _AroundBlock(_Chain(tuple(before)), block, _Chain(tuple(after)), keywords)


Blocks = Sequence[tuple[str, nn.Module]]
"""By name, in order."""


def with_ends(
    blocks: Blocks,
    stem: Sequence[Function],
    head: Sequence[Function],
    head_owns: tuple[str, ...],
    *,
    between: Mapping[str, tuple[str, nn.Module]] | None = None,
    keywords: Mapping[str, Keywords] | None = None,
) -> list[Stage]:
    """A stage for each block; the first runs the stem before it, the last the head after it.

    Args:
        blocks: of the model.
        stem: from images to what the first block takes.
        head: from what the last block returns to logits.
        head_owns: prefixes of the names of the head's parameters.
        between: a module by its name that is run before a block, by the block's name: it belongs to the block's stage.
        keywords: see `around`, by the block's name.

    Raises:
        UserError: there is no block.
    """
    if not blocks:
        raise UserError("it was built without a block")
    between, keywords, last = between or {}, keywords or {}, len(blocks) - 1
    stages = []
    for i, (name, block) in enumerate(blocks):
        inner = [between[name]] if name in between else []
        before: list[Function] = [*(stem if i == 0 else ()), *(module for _, module in inner)]
        forward = around(block, before=before, after=head if i == last else (), keywords=keywords.get(name))
        owns = (*(owned for owned, _ in inner), *(head_owns if i == last else ()))
        stages.append(Stage(name, block, forward, owns))
    return stages


def blocks_of(layers: Iterable[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """The children of layers that run them one after another.

    Args:
        layers: by name, in order.
    """
    return [(f"{name}.{own}", block) for name, layer in layers for own, block in layer.named_children()]


def downsampled(name: str, layers: Sequence[Any]) -> tuple[Blocks, dict[str, tuple[str, nn.Module]]]:
    """The blocks of layers each of which has a `downsample` and then `blocks`; and what runs between them.

    Args:
        name: of the layers in the model.
        layers: in order.

    Raises:
        UserError: a layer has no blocks, so that its downsampling belongs to none.
    """
    blocks: list[tuple[str, nn.Module]] = []
    between: dict[str, tuple[str, nn.Module]] = {}
    for i, layer in enumerate(layers):
        if not len(layer.blocks):
            raise UserError(f"its {name}.{i} was built without a block, and what is left of it belongs to none")
        # What makes feature maps smaller goes with the first block that takes them.
        between[f"{name}.{i}.blocks.0"] = f"{name}.{i}.downsample", layer.downsample
        blocks += [(f"{name}.{i}.blocks.{j}", block) for j, block in enumerate(layer.blocks)]
    return blocks, between


_OF_MASKS = "the patterns depth and block work"


def stages_of(
    model: nn.Module,
    names: Sequence[str] | None = None,
    *,
    images: Tensor | Sequence[int] = IMAGES,
    what: str = _OF_MASKS,
) -> list[Stage]:
    """The stages of a model: one per residual or transformer block.

    Args:
        model: timm's or torchvision's, of a family that is known here; any module, with `names`.
        names: of its blocks, in the order in which they run, e.g. ["encoder.layers.0", "encoder.layers.1"]: the model
            is traced and held against its stages (`named_stages`).
        images: with `names`, a batch that the model takes, by which that is done; or the shape of a random one.
        what: needs them, in the words of the error.

    Raises:
        UserError: the model's family is not known here, or it is no sequence of blocks, or not of the named ones.
    """
    if names is not None:
        return named_stages(model, names, images)
    family = _family_of(model)
    if family is None:
        raise UserError(_without_stages(model, what))
    try:
        return family.stages(model)
    except UserError as error:
        raise UserError(f"{type(model).__name__} has no stages here: {error}") from error


def staged(model: nn.Module) -> StagedModel:
    """`model` in stages where its family is known, else as one single stage (which cannot be cut)."""
    try:
        return StagedModel(model, stages_of(model))
    except UserError:
        return StagedModel(model, [Stage("", model, model.__call__)])


def _family_of(model: nn.Module) -> Family | None:
    return next((entry.value for entry in FAMILIES.values() if type(model) is entry.value.cls), None)


def _without_stages(model: nn.Module, what: str) -> str:
    """Says that a model is of no family, and what would work."""
    cls, library = type(model), type(model).__module__.partition(".")[0]
    if library == "timm" and (cls.__name__.endswith("Features") or "._features" in cls.__module__):
        return (
            f"{cls.__name__}, which timm builds with features_only=True, has no stages: it puts out the feature maps "
            "of several depths, and each of them would have to pass every cut behind it; build the model without"
        )
    whose = f"{library}'s " if library != "timm" and cls.__name__ in FAMILIES else ""
    blocks = likely_blocks(model)
    hint = f" (its blocks may be {blocks[0]} to {blocks[-1]})" if blocks else ""
    others = "; element, row, tensor, nm, norm and named work on any model" if what == _OF_MASKS else ""
    return (
        f"{whose}{cls.__name__} has no stages: {what} on {known_families()}; on other models where their blocks are "
        f"named, by model.stages or stages_of(model, [...]){hint}, and in Python on a StagedModel built from stages of "
        f"your own{others}"
    )


def known_families() -> str:
    """The classes that have stages, in words."""
    names = sorted((library or "timm", name) for library, _, name in (key.rpartition(".") for key in FAMILIES))
    return " and ".join(
        f"{library}'s {', '.join(name for _, name in of_library)}"
        for library, of_library in groupby(names, key=lambda pair: pair[0])
    )


def likely_blocks(model: nn.Module) -> list[str]:
    """Names of the modules that may be a model's blocks: the longest list of modules of one class that it holds.

    Not a list within a list: an expert or a head is no block.
    """
    best: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.Sequential, nn.ModuleList)):
            children = list(module.named_children())
            alike = len({type(child) for _, child in children}) == 1
            weighty = all(any(True for _ in child.children()) for _, child in children)
            if alike and weighty and len(children) > max(1, len(best)):
                best = [f"{name}.{own}" if name else own for own, _ in children]
    return best

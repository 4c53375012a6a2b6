"""A network as a sequence of stages, so that a prefix can run once and serve both passes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .batchnorm import batchnorms, repeating


@dataclass(frozen=True)
class Stage:
    """One block with what belongs to it.

    Attributes:
        name: the block's name in the model, e.g. `layer1.0`.
        block: the module of that name: what is sharded and compiled as one unit.
        forward: the stage's part of the model's forward: the output of the stage before to its own.
        owns: prefixes of the names of the parameters that the stage uses beside the block's.
    """

    name: str
    block: nn.Module
    forward: Callable[[Tensor], Tensor]
    owns: tuple[str, ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Stage:
        """Of the copied block; a forward that is written as a function runs the copies of the modules that it names.

        Raises:
            TypeError: it names a module that is a global, of which a copy has none.
        """
        return Stage(self.name, copy.deepcopy(self.block, memo), _copied(self.forward, memo), self.owns)


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """A deep copy also of what functions have in their closures and defaults, which `copy.deepcopy` shares."""
    if isinstance(value, partial):
        keywords = {key: _copied(part, memo) for key, part in value.keywords.items()}
        return partial(_copied(value.func, memo), *[_copied(part, memo) for part in value.args], **keywords)
    if not isinstance(value, FunctionType):
        return copy.deepcopy(value, memo)
    if id(value) in memo:
        return memo[id(value)]
    for name in value.__code__.co_names:
        if isinstance(value.__globals__.get(name), nn.Module):
            raise TypeError(
                f"the forward of a stage uses the global {name}, which a copy would share with the original; let a "
                "function build the stages of a model that it is given"
            )
    cells = tuple(CellType() for _ in value.__closure__ or ())
    result = FunctionType(value.__code__, value.__globals__, value.__name__, None, cells)
    memo[id(value)] = result
    for cell, original in zip(cells, value.__closure__ or (), strict=True):
        cell.cell_contents = _copied(original.cell_contents, memo)
    result.__defaults__ = _copied(value.__defaults__, memo)
    result.__kwdefaults__ = _copied(value.__kwdefaults__, memo)
    return result


class StagedModel(nn.Module):
    """A model that can run any consecutive part of itself: `staged(x, start, stop)`.

    The whole model is `staged(x)`; the prefix of a cut is `staged(x, stop=cut)` and the suffix `staged(h, start=cut)`.
    Being one `forward`, it passes unchanged through the wrappers of DDP, FSDP2 and DeepSpeed.

    With activation checkpointing a forward in training mode keeps the input of each stage, and the backward computes
    the stage again, with the same random numbers and without touching BatchNorm's statistics a second time: the
    gradients are the same, bit for bit. Not the last stage's, whose backward comes first: keeping it costs no memory.
    What timm's `set_grad_checkpointing` says of the model counts as asking for it.

    Args:
        model: the network; `staged.model` afterwards.
        stages: its stages in order; their forwards, composed, must equal `model.forward`.
        activation_checkpointing: whether stages are computed again in the backward. May be changed between steps.

    Raises:
        ValueError: there is no stage.
    """

    def __init__(self, model: nn.Module, stages: Sequence[Stage], *, activation_checkpointing: bool = False) -> None:
        super().__init__()
        if not stages:
            raise ValueError("a staged model needs at least one stage")
        self.model = model
        self.stages = tuple(stages)
        self.activation_checkpointing = activation_checkpointing

    def forward(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Run stages `start` to `stop` (exclusive) on the output of stage `start - 1`, the images if `start` is 0.

        Raises:
            ValueError: no gradient flows through the first stage of a suffix, because it is checkpointed reentrantly.
        """
        graph = torch.is_grad_enabled()
        again = graph and self.training and (self.activation_checkpointing or self._checkpointed_by_timm())
        layers = batchnorms(self.model) if again else []

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            """Around a stage's forward, and around computing it again."""
            return nullcontext(), repeating(layers)

        for stage in self.stages[start:stop]:
            if again and stage is not self.stages[-1]:
                x = checkpoint(stage.forward, x, use_reentrant=False, context_fn=contexts)
            else:
                x = stage.forward(x)
            if graph and start and stage is self.stages[start] and not x.requires_grad:
                self._check_graph(stage)
        return x

    def _checkpointed_by_timm(self) -> bool:
        return any(getattr(module, "grad_checkpointing", False) for module in self.model.modules())

    @staticmethod
    def _check_graph(stage: Stage) -> None:
        if any(p.requires_grad for p in stage.block.parameters()):
            raise ValueError(
                f"no gradient flows through {stage.name}, the first stage behind a cut, whose weights are trained: "
                "reentrant checkpointing computes none where its input has none; use use_reentrant=False, or "
                "StagedModel(…, activation_checkpointing=True)"
            )

    def stages_of_parameters(self) -> dict[str, tuple[int, ...]]:
        """The indices of the stages that use each parameter, rising, by its name in `model`.

        A tied weight has several, and belongs to the first: perturbing it would change the prefix of every later cut.
        What no stage claims is counted to the first stage for the same reason.
        """
        claims = [
            (prefix, index) for index, stage in enumerate(self.stages) for prefix in (stage.name, *stage.owns) if prefix
        ]
        uses: dict[int, set[int]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            index = next((i for prefix, i in claims if name == prefix or name.startswith(prefix + ".")), 0)
            uses.setdefault(id(parameter), set()).add(index)
        return {name: tuple(sorted(uses[id(parameter)])) for name, parameter in self.model.named_parameters()}

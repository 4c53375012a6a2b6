"""A network as a sequence of stages, so that a prefix can run once and serve both passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

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


class StagedModel(nn.Module):
    """A model that can run any consecutive part of itself: `staged(x, start, stop)`.

    The whole model is `staged(x)`; the prefix of a cut is `staged(x, stop=cut)` and the suffix `staged(h, start=cut)`.
    Being one `forward`, it passes unchanged through the wrappers of DDP, FSDP2 and DeepSpeed.

    With activation checkpointing a forward in training mode keeps the input of each stage, and the backward computes
    the stage again, with the same random numbers and without touching BatchNorm's statistics a second time: the
    gradients are the same, bit for bit. Not the last stage's, whose backward comes first: keeping it costs no memory.

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
        """Run stages `start` to `stop` (exclusive) on the output of stage `start - 1`, the images if `start` is 0."""
        again = self.activation_checkpointing and self.training and torch.is_grad_enabled()
        layers = batchnorms(self.model) if again else []

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            """Around a stage's forward, and around computing it again."""
            return nullcontext(), repeating(layers)

        for stage in self.stages[start:stop]:
            if again and stage is not self.stages[-1]:
                x = checkpoint(stage.forward, x, use_reentrant=False, context_fn=contexts)
            else:
                x = stage.forward(x)
        return x

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

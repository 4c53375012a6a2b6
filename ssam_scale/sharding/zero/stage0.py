"""ZeRO stage 0: nothing is sharded, and every rank perturbs all weights.

The ascent gradient is `.grad`, which the engine has all-reduced in the backward; the perturbation is written to the
parameters, on every rank the same, so there is nothing to publish; `.grad` is cleared between the passes. In bf16 the
optimizer steps float32 masters, which the perturbation does not touch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ssam_scale.sharding.interface import AscentReduction
from ssam_scale.sharding.unsharded import ReplicatedWeights, TorchState

from .engine import DeepSpeedTraining, check_internals
from .masters import Master, MasterState

# Of the class that DeepSpeed wraps the optimizer in.
_LOW_PRECISION_INTERNALS = {
    "fp16_groups": "which parameters are trained, by group; the optimizer's own groups hold the masters instead",
    "fp32_groups": "the masters: they key the optimizer's state, and loading writes them",
}


class _Stage0(ReplicatedWeights, DeepSpeedTraining):
    """Passes of stage 0, with an ascent that reduces no more than it needs.

    The engine reduces a gradient of every parameter that requires one, and zeros where there is none. An ascent that
    starts behind the first block has none before it: while the engine looks for gradients, these do not require any.
    """

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        self._not_reduced: list[nn.Parameter] = []

    @contextmanager
    def ascent(self, reduction: AscentReduction) -> Iterator[None]:
        """The engine averages, in the backward, the gradients of no other parameters than these."""
        reduced = {id(p) for p in reduction.parameters}
        self._not_reduced = [p for p in self.network.parameters() if p.requires_grad and id(p) not in reduced]
        try:
            yield
        finally:
            self._not_reduced = []

    def backward(self, loss: Tensor) -> None:
        """The engine's. The graph is there already and does not care what requires a gradient now."""
        for p in self._not_reduced:
            p.requires_grad_(False)
        try:
            super().backward(loss)
        finally:
            for p in self._not_reduced:
                p.requires_grad_(True)


class ZeRO0(TorchState, _Stage0):
    """Stage 0 in fp32: the optimizer steps the model's own parameters."""


class ZeRO0LowPrecision(MasterState, _Stage0):
    """Stage 0 in bf16: the optimizer steps float32 masters."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        check_internals(engine.optimizer, _LOW_PRECISION_INTERNALS)
        self._groups = engine.optimizer.fp16_groups
        self._masters = {
            id(p): Master(master, 0, master.numel(), index)
            for index, groups in enumerate(zip(self._groups, engine.optimizer.fp32_groups, strict=True))
            for p, master in zip(*groups, strict=True)
        }

    def groups(self) -> list[list[nn.Parameter]]:
        """The model's parameters that the optimizer steps masters of, by group."""
        return [list(group) for group in self._groups]

    def master(self, parameter: nn.Parameter) -> Master:
        """The parameter's master, unsharded."""
        return self._masters[id(parameter)]

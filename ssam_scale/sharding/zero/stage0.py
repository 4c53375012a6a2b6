"""ZeRO stage 0: nothing is sharded, and every rank perturbs all weights.

The ascent gradient is `.grad`, of which the masked elements are all-reduced here, within the engine's `no_sync`; the
perturbation is written to the parameters, on every rank the same, so there is nothing to publish; `.grad` is cleared
between the passes. In bf16 the optimizer steps float32 masters, which the perturbation does not touch.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ssam_scale.sharding.unsharded import ReplicatedWeights, TorchState

from .engine import DeepSpeedTraining, check_internals
from .masters import Master, MasterState

# Of the class that DeepSpeed wraps the optimizer in.
_LOW_PRECISION_INTERNALS = {
    "fp16_groups": "which parameters are trained, by group; the optimizer's own groups hold the masters instead",
    "fp32_groups": "the masters: they key the optimizer's state, and loading writes them",
}


class _Stage0(ReplicatedWeights, DeepSpeedTraining):
    """Passes of stage 0, which reduce the ascent's gradients themselves."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        self.reduce_ascents()


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

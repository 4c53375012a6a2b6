"""ZeRO stage 0: nothing is partitioned; gradients are where autograd leaves them."""

from __future__ import annotations

from typing import Any

from torch import nn

from ssam_scale.sharding.unsharded import Unsharded

from .engine import Whole, check_internals
from .masters import Master, MasterWeights

# Internals by the class that DeepSpeed wraps the optimizer in.
_LOW_PRECISION_0 = {
    "fp16_groups": "which parameters are trained, by group; the optimizer's own groups hold float32 copies instead",
    "fp32_groups": "these copies: they key the optimizer's state, and loading writes them",
}


class ZeRO0(Whole, Unsharded):
    """Stage 0 in fp32: everything is where autograd has it."""


class ZeRO0LowPrecision(Whole, MasterWeights, Unsharded):
    """Stage 0 in bf16: everything is where autograd has it, but the optimizer steps float32 copies."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        check_internals(engine.optimizer, _LOW_PRECISION_0)
        self._groups = engine.optimizer.fp16_groups
        self._masters = {
            id(p): Master(master, 0, master.numel(), index)
            for index, groups in enumerate(zip(self._groups, engine.optimizer.fp32_groups, strict=True))
            for p, master in zip(*groups, strict=True)
        }

    def groups(self) -> list[list[nn.Parameter]]:
        """The model's parameters that the optimizer steps copies of, by group."""
        return [list(group) for group in self._groups]

    def master(self, parameter: nn.Parameter) -> Master:
        """The copy, whole."""
        return self._masters[id(parameter)]

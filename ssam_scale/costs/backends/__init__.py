"""What a step sends, and what is held for it, by backend: one file a kind of backend behind one interface."""

from __future__ import annotations

from collections.abc import Callable

from ssam_scale.costs.cluster import Placement
from ssam_scale.costs.workload import Weights

from .fsdp import FSDP2Costs
from .interface import BackendCosts, Holding, InPass
from .replicated import DDPCosts, SingleCosts
from .zero import ZeRO0Costs, ZeRO12Costs
from .zero3 import ZeRO3Costs

__all__ = ["BackendCosts", "Holding", "InPass", "costs_of"]

_BY_BACKEND: dict[str, Callable[[Weights, Placement, int], BackendCosts]] = {
    "single": SingleCosts,
    "ddp": DDPCosts,
    "fsdp2": FSDP2Costs,
    "zero0": ZeRO0Costs,
    "zero1": ZeRO12Costs,
    "zero2": ZeRO12Costs,
    "zero3": ZeRO3Costs,
}


def costs_of(weights: Weights, placement: Placement, accumulation: int = 1) -> BackendCosts:
    """What a step of `accumulation` micro-batches sends and holds when `weights` are spread in this way."""
    return _BY_BACKEND[placement.backend](weights, placement, accumulation)

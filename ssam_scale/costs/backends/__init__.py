"""What a step sends, and what is held for it, by backend: one file a kind of backend behind one interface."""

from __future__ import annotations

from ssam_scale.costs.cluster import Spreading
from ssam_scale.costs.workload import Weights

from .fsdp import FSDP2Costs
from .interface import BackendCosts, Holding, InPass
from .replicated import DDPCosts, SingleCosts
from .zero import ZeRO0Costs, ZeRO12Costs
from .zero3 import ZeRO3Costs

__all__ = ["BackendCosts", "Holding", "InPass", "costs_of"]


def costs_of(weights: Weights, spreading: Spreading, accumulation: int = 1) -> BackendCosts:
    """What a step of `accumulation` micro-batches sends and holds when `weights` are spread in this way."""
    match spreading.backend:
        case "single":
            return SingleCosts(weights, spreading, accumulation)
        case "ddp":
            return DDPCosts(weights, spreading, accumulation)
        case "fsdp2":
            return FSDP2Costs(weights, spreading, accumulation)
        case "zero0":
            return ZeRO0Costs(weights, spreading, accumulation)
        case "zero1" | "zero2":
            return ZeRO12Costs(weights, spreading, accumulation)
        case "zero3":
            return ZeRO3Costs(weights, spreading, accumulation)

"""Predicted communication and memory of a step, by backend: one interface, one file a backend."""

from __future__ import annotations

import importlib
import pkgutil

from ssam_scale.costs.cluster import Placement
from ssam_scale.costs.workload import Weights

from .interface import COSTS, BackendCosts, MemoryUse, PassTraffic

__all__ = ["BackendCosts", "MemoryUse", "PassTraffic", "costs_of"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")


def costs_of(weights: Weights, placement: Placement, accumulation: int = 1) -> BackendCosts:
    """What a step of `accumulation` micro-batches sends and holds when `weights` are placed in this way."""
    return COSTS[placement.backend](weights, placement, accumulation)

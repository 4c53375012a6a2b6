"""Sparse Sharpness-Aware Minimization at scale.

from ssam_scale import SparseSAM
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import UserError
    from .masks import NM, Annealed, AnnealedCut, Dense, Depth, DepthByCost, Dynamic, Named, Norms, Scored
    from .perturbation import (
        CosineRadius,
        Interval,
        LRRadius,
        Savings,
        SparseSAM,
        Stage,
        StagedModel,
        Window,
        ascent_seconds,
        sampled_label_loss,
    )

__version__ = "0.1.0"
__all__ = [
    "NM",
    "Annealed",
    "AnnealedCut",
    "CosineRadius",
    "Dense",
    "Depth",
    "DepthByCost",
    "Dynamic",
    "Interval",
    "LRRadius",
    "Named",
    "Norms",
    "Savings",
    "Scored",
    "SparseSAM",
    "Stage",
    "StagedModel",
    "UserError",
    "Window",
    "__version__",
    "ascent_seconds",
    "sampled_label_loss",
]

# Imported when first used: a command that only reads a configuration should not wait seconds for torch.
_HOMES = {
    "Annealed": "masks",
    "AnnealedCut": "masks",
    "CosineRadius": "perturbation",
    "Dense": "masks",
    "Depth": "masks",
    "DepthByCost": "masks",
    "Dynamic": "masks",
    "Interval": "perturbation",
    "Savings": "perturbation",
    "NM": "masks",
    "Named": "masks",
    "Norms": "masks",
    "Scored": "masks",
    "SparseSAM": "perturbation",
    "Stage": "perturbation",
    "StagedModel": "perturbation",
    "LRRadius": "perturbation",
    "UserError": "errors",
    "Window": "perturbation",
    "ascent_seconds": "perturbation",
    "sampled_label_loss": "perturbation",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)

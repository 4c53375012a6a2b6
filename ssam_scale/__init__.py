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
        DescentSamples,
        Fresh,
        Friendly,
        Gate,
        Interval,
        LRRadius,
        Momentum,
        Previous,
        Savings,
        SparseSAM,
        Stage,
        StagedModel,
        VaSSO,
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
    "DescentSamples",
    "Dynamic",
    "Fresh",
    "Friendly",
    "Gate",
    "Interval",
    "LRRadius",
    "Momentum",
    "Named",
    "Norms",
    "Previous",
    "Savings",
    "Scored",
    "SparseSAM",
    "Stage",
    "StagedModel",
    "UserError",
    "VaSSO",
    "Window",
    "__version__",
    "ascent_seconds",
    "sampled_label_loss",
]


def __getattr__(name: str) -> Any:
    """A public name, imported when it is first used: reading a configuration should not wait seconds for torch."""
    if name in __all__:
        for package in ("errors", "masks", "perturbation"):
            found = getattr(importlib.import_module(f"{__name__}.{package}"), name, None)
            if found is not None:
                return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

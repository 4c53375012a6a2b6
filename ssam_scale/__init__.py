"""Sparse Sharpness-Aware Minimization at scale.

from ssam_scale import SparseSAM
"""

from .errors import UserError
from .masks import Dense, Depth, Scored
from .perturbation import SparseSAM, Stage, StagedModel

__version__ = "0.1.0"
__all__ = ["Dense", "Depth", "Scored", "SparseSAM", "Stage", "StagedModel", "UserError", "__version__"]

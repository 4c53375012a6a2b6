"""Which weights are perturbed."""

from .depth import AnnealedCut, Depth, DepthByCost, from_blocks
from .dynamic import Dynamic
from .nm import NM
from .plan import Layout, Mask, Plan
from .score_based import Annealed, Chosen, Refreshed, Score, Scores
from .static import Dense, Named, Norms
from .subset import Bits, Part, Rows, add_, compacted, pack, popcount, put_, taken, unpack
from .top_scores import Scored

__all__ = [
    "NM",
    "Annealed",
    "AnnealedCut",
    "Bits",
    "Chosen",
    "Dense",
    "Depth",
    "DepthByCost",
    "Dynamic",
    "Layout",
    "Mask",
    "Named",
    "Norms",
    "Part",
    "Plan",
    "Refreshed",
    "Rows",
    "Score",
    "Scored",
    "Scores",
    "add_",
    "compacted",
    "from_blocks",
    "pack",
    "popcount",
    "put_",
    "taken",
    "unpack",
]

"""Which weights are perturbed."""

from .chosen import Annealed, Chosen, Refreshed, Score, Scores
from .cuts import AnnealedCut, Depth, DepthByCost, from_blocks
from .dynamic import Dynamic
from .fixed import Dense, Named, Norms
from .nm import NM
from .parts import Bits, Part, Rows, add_, compacted, pack, popcount, put_, taken, unpack
from .plan import Layout, Mask, Plan
from .scored import Scored

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

"""Which weights are perturbed."""

from .chosen import Annealed, Chosen, Score, Scores
from .dynamic import Dynamic
from .fixed import Dense, Depth, Named, Norms
from .nm import NM
from .parts import Bits, Part, Rows, pack, popcount, unpack
from .plan import Layout, Mask, Plan
from .scored import Scored

__all__ = [
    "NM",
    "Annealed",
    "Bits",
    "Chosen",
    "Dense",
    "Depth",
    "Dynamic",
    "Layout",
    "Mask",
    "Named",
    "Norms",
    "Part",
    "Plan",
    "Rows",
    "Score",
    "Scored",
    "Scores",
    "pack",
    "popcount",
    "unpack",
]

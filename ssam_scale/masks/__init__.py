"""Masks: which weights each step perturbs. One file for each pattern; `registry` has them all by name."""

from ssam_scale import torch_compat  # noqa: F401 - refuses a torch that is too old, before anything looks for more

from .backup import Backup
from .dense import Dense
from .depth import AnnealedCut, Depth, DepthByCost, suffix_sums
from .dynamic import Dynamic
from .masked import inner_product, masked_add_, masked_scatter_, masked_select, masked_squares
from .named import Named
from .nm import NM
from .norm import Norms
from .plan import Layout, Mask, Plan
from .registry import MASKS, RunInfo, build_mask, register_mask
from .score_based import Annealed, Refreshed, Score, ScoreBased, Scores
from .shard_group import ShardGroup
from .subset import BitMask, Rows, Subset, pack, popcount, unpack
from .top_scores import Scored

__all__ = [
    "MASKS",
    "NM",
    "Annealed",
    "AnnealedCut",
    "Backup",
    "BitMask",
    "Dense",
    "Depth",
    "DepthByCost",
    "Dynamic",
    "Layout",
    "Mask",
    "Named",
    "Norms",
    "Plan",
    "Refreshed",
    "Rows",
    "RunInfo",
    "Score",
    "ScoreBased",
    "Scored",
    "Scores",
    "ShardGroup",
    "Subset",
    "build_mask",
    "inner_product",
    "masked_add_",
    "masked_scatter_",
    "masked_select",
    "masked_squares",
    "pack",
    "popcount",
    "register_mask",
    "suffix_sums",
    "unpack",
]

"""N of every M weights along the dimension that a product sums over."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from ssam_scale.checks import check_number
from ssam_scale.config.mask_sections import NMMask

from .plan import Layout, Mask
from .registry import RunInfo, register_mask
from .score_based import Score, ScoreBased, Scores, check_one_of
from .shard_group import ShardGroup
from .subset import BitMask, Subset, pack

_CHUNK = 1 << 20  # weights that are sorted at a time
Choice: TypeAlias = Literal["perturbed", "unperturbed"]


class NM(ScoreBased):
    """The `n` highest scores of each `m` consecutive input features (channels) of linear layers and convolutions.

    For a convolution the groups run over the channels at one place of the kernel, which is the order in which sparse
    tensor cores would want them (N:M of arXiv 2306.17504). Of equal scores the first win. The density of such a weight
    is exactly n / m.

    Args:
        n: perturbed weights of a group.
        m: size of a group.
        score: what decides; see `SparseSAM.refresh`.
        others: what becomes of all other parameters (biases, normalization layers, embeddings): perturbed, as in the
            papers' code, or not.
        indivisible: what becomes of weights whose number of input features is not a multiple of m, such as the first
            convolution of three colours; `refused` is an error that names them.
        every: steps between two refreshes; None: chosen once.
        seed: of random scores.

    Raises:
        ValueError: not 0 < n <= m, or an argument is none of its choices.
    """

    def __init__(
        self,
        n: int,
        m: int,
        *,
        score: Score = "fisher",
        others: Choice = "perturbed",
        indivisible: Choice | Literal["refused"] = "refused",
        every: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__((score,), every, seed)
        for name, count in {"n": n, "m": m}.items():
            check_number(name, count, "at least 0", lambda count: count >= 0, whole=True)
        if not 0 < n <= m:
            raise ValueError(f"n is {n} and m is {m}; 0 < n <= m is needed")
        check_one_of("others", others, get_args(Choice))
        check_one_of("indivisible", indivisible, (*get_args(Choice), "refused"))
        self.n, self.m = n, m
        self.others = others
        self.indivisible = indivisible

    def __repr__(self) -> str:
        return f"a {self.n}:{self.m} mask"

    def check(self, layout: Layout) -> None:
        """Groups must fit, and there must be some.

        Raises:
            ValueError: a weight's input features do not make groups of m, or there is no weight to choose in.
        """
        weights = [name for name in layout.shapes if name in layout.contracted]
        odd = [name for name in weights if layout.shapes[name][1] % self.m]
        if odd and self.indivisible == "refused":
            features = layout.shapes[odd[0]][1]
            raise ValueError(
                f"{odd[0]} has {features} input features, which do not make groups of {self.m} ({len(odd)} of "
                f"{len(weights)} weights): choose another m, or let indivisible be perturbed or unperturbed"
            )
        if len(odd) == len(weights):
            raise ValueError(
                f"the model has no weight of a linear layer or convolution that takes a {self.n}:{self.m} mask"
            )

    def choose(
        self, layout: Layout, scores: Mapping[Score, Scores], group: ShardGroup, step: int
    ) -> Mapping[str, Subset | None]:
        """See `ScoreBased`."""
        [given] = scores.values()
        shards = [
            _GroupedShard(
                layout.starts.get(name, 0), layout.numels[name], math.prod(layout.shapes[name][2:]), self.n, self.m
            )
            for name in given
            if self._fits(layout, name)
        ]
        names = [name for name in given if self._fits(layout, name)]
        masks = dict(zip(names, _highest_in_groups(shards, [given[name] for name in names], group), strict=True))
        result: dict[str, Subset | None] = {}
        for name, local in given.items():
            if name in masks:
                result[name] = BitMask(pack(masks[name]), local.numel())
            elif (self.indivisible if name in layout.contracted else self.others) == "perturbed":
                result[name] = None
        return result

    def _fits(self, layout: Layout, name: str) -> bool:
        return name in layout.contracted and layout.shapes[name][1] % self.m == 0


@dataclass(frozen=True)
class _GroupedShard:
    """Where a shard lies among its parameter's blocks: `inner` interleaved groups, contiguous together.

    Attributes:
        start: position of the shard's first element.
        numel: elements of the parameter.
        inner: places of the kernel.
        n, m: of the mask.
    """

    start: int
    numel: int
    inner: int
    n: int
    m: int

    @property
    def block(self) -> int:
        """Elements of a block."""
        return self.m * self.inner

    def highest(self, scores: Tensor) -> Tensor:
        """True for the n highest of each group of whole blocks, of shape (elements of the blocks,)."""
        result = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
        whole = max(1, _CHUNK // self.block) * self.block
        for part, out in zip(scores.split(whole), result.split(whole), strict=True):
            groups = part.view(-1, self.m, self.inner)
            order = groups.sort(dim=1, descending=True, stable=True).indices[:, : self.n]
            out.view(groups.shape).scatter_(1, order, True)
        return result


def _highest_in_groups(shards: list[_GroupedShard], scores: list[Tensor], group: ShardGroup) -> list[Tensor]:
    """Boolean masks of the local scores. Processes exchange the scores of blocks that straddle their shards."""
    if not shards:
        return []
    device = scores[0].device
    blocks_of = _straddling_blocks(shards, scores, group, device)
    # One all-reduce of the straddling blocks of all parameters, in which each process fills in what it has.
    lengths = [len(blocks) * shard.block for shard, blocks in zip(shards, blocks_of, strict=True)]
    straddling = torch.zeros(sum(lengths), device=device)
    for shard, s, blocks, seen in zip(shards, scores, blocks_of, straddling.split(lengths), strict=True):
        for block, buffer in zip(blocks, seen.view(-1, shard.block), strict=True):
            first, last, inside = _overlap(shard, block, s.numel())
            if first < last:
                buffer[inside : inside + last - first] = s.reshape(-1)[first:last]
    if group.size > 1:
        straddling = group.all_reduce(straddling)
    result = []
    for shard, s, blocks, seen in zip(shards, scores, blocks_of, straddling.split(lengths), strict=True):
        flat = s.reshape(-1)
        mask = torch.zeros(flat.shape, dtype=torch.bool, device=device)
        head = min(-shard.start % shard.block, flat.numel())
        tail = head + (flat.numel() - head) // shard.block * shard.block
        mask[head:tail] = shard.highest(flat[head:tail])
        for block, chosen in zip(blocks, shard.highest(seen).view(-1, shard.block), strict=True):
            first, last, inside = _overlap(shard, block, flat.numel())
            if first < last:
                mask[first:last] = chosen[inside : inside + last - first]
        result.append(mask)
    return result


def _straddling_blocks(
    shards: list[_GroupedShard], scores: list[Tensor], group: ShardGroup, device: torch.device
) -> list[list[int]]:
    """Of each parameter, the blocks that a shard begins within; the same on every process."""
    if group.size == 1:
        return [[] for _ in shards]
    starts = torch.zeros(group.size, len(shards), dtype=torch.int64, device=device)
    mine = [shard.start if s.numel() else 0 for shard, s in zip(shards, scores, strict=True)]
    starts[group.rank] = torch.tensor(mine, device=device)
    all_starts = group.all_reduce(starts).T.tolist()
    return [
        sorted({start // shard.block for start in column if start % shard.block})
        for shard, column in zip(shards, all_starts, strict=True)
    ]


def _overlap(shard: _GroupedShard, block: int, length: int) -> tuple[int, int, int]:
    """Where a block lies in the shard, from and up to; and where that begins in the block."""
    begin = block * shard.block - shard.start
    first = min(max(begin, 0), length)
    return first, min(max(begin + shard.block, 0), length), first - begin


@register_mask(NMMask, "n of every m consecutive input features (channels), by score", "arXiv 2306.17504")
def build(section: NMMask, run: RunInfo) -> Mask:
    """The mask of its section."""
    return NM(
        section.n,
        section.m,
        score=section.score,
        others=section.others,
        indivisible=section.indivisible,
        every=run.steps_between_refreshes(section),
        seed=run.seed,
    )

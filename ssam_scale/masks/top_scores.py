"""Masks of the highest scores: single weights, rows, tensors or blocks, within a budget of weights."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from ssam_scale.config.mask_sections import Allocation, BlockMask, ElementMask, RowMask, TensorMask

from .allocation import budgets
from .dynamic import dynamic_mask
from .plan import Layout, Mask
from .registry import RunInfo, register_mask
from .score_based import (
    Score,
    ScoreBased,
    Scores,
    Sparsity,
    annealed_sparsity,
    check_one_of,
    check_sparsity,
    sparsity_at,
)
from .selection import greedy_units, top_k, unit_means
from .shard_group import ShardGroup
from .subset import BitMask, Rows, Subset

Pattern: TypeAlias = Literal["element", "row", "tensor", "block"]


class Scored(ScoreBased):
    """The highest scores within a budget of int(N(1 − sparsity)) of N weights.

    | pattern | perturbs | weights |
    |---|---|---|
    | `element` | single weights | exactly the budget |
    | `row` | output channels: slices along the first dimension; of a vector, its elements | within the budget |
    | `tensor` | whole parameters | within the budget |
    | `block` | all parameters of a block (see `Layout.stages`) | within the budget |

    Rows, tensors and blocks are chosen in the order of their mean score, and one that does not fit into what is left of
    the budget is passed over; so the density falls short by less than the smallest one left out. Equal scores go to
    the earlier one, but of those that are 0, where too few are above, some are drawn: a network whose residual branches
    begin at zero has no gradient in them at first, and its earlier blocks are worth no more than its later ones. The
    score `random` is one number of each.

    Scores come from `SparseSAM.refresh`; before the first one there is no plan.

    Args:
        pattern: granularity.
        sparsity: share of the weights that is not perturbed, in [0, 1), or one that changes over time.
        score: what decides; see `SparseSAM.refresh`.
        allocation: of the budget to parameters, for `element` and `row`: `global`, wherever the scores are highest;
            `uniform`, in proportion to their size; `erk` (see `allocation.erk`).
        every: steps between two refreshes; None: chosen once.
        seed: of random scores.
        independent: each tensor or block is perturbed with probability 1 − sparsity, whatever the others are, in the
            place of a budget (ESAM, arXiv 2110.03141); at least one is. Small ones nearly always fit into what is left
            of a budget, and large ones seldom. For the score `random`.

    Raises:
        ValueError: sparsity is outside [0, 1), or the pattern has no such allocation or score.
    """

    def __init__(
        self,
        pattern: Pattern = "element",
        sparsity: Sparsity = 0.5,
        *,
        score: Score = "fisher",
        allocation: Allocation = "global",
        every: int | None = None,
        seed: int = 0,
        independent: bool = False,
    ) -> None:
        super().__init__((score,), every, seed)
        check_one_of("pattern", pattern, get_args(Pattern))
        check_one_of("allocation", allocation, get_args(Allocation))
        check_sparsity(sparsity)
        if allocation != "global" and pattern in ("tensor", "block"):
            raise ValueError(f"allocation {allocation!r} shares out single weights or rows; pattern is {pattern!r}")
        if independent and (pattern not in ("tensor", "block") or score != "random"):
            raise ValueError(
                f"independent draws are of tensors or blocks by the score 'random'; pattern is {pattern!r} and score "
                f"{score!r}"
            )
        self.pattern = pattern
        self.sparsity = sparsity
        self.allocation = allocation
        self.independent = independent
        self.kept_as = "bits" if pattern == "element" else "rows" if pattern == "row" else "whole"

    def __repr__(self) -> str:
        return f"a mask of pattern {self.pattern} and sparsity {self.sparsity}"

    def check(self, layout: Layout) -> None:
        """Blocks need a model in stages.

        Raises:
            ValueError: there is one block only.
        """
        if self.pattern == "block" and layout.depth == 1:
            raise ValueError("pattern 'block' needs a model in stages: wrap it in StagedModel")

    def wanted(self) -> Sequence[Score]:
        """None where whole parameters are chosen at random: no element needs a number."""
        wanted = super().wanted()
        return () if self.kept_as == "whole" and "random" in wanted else wanted

    def choose(
        self, layout: Layout, scores: Mapping[Score, Scores], group: ShardGroup, step: int
    ) -> Mapping[str, Subset | None]:
        """See `ScoreBased`."""
        budget = int(layout.total * (1.0 - sparsity_at(self.sparsity, step)))
        drawn, given = scores.keys() <= {"random"}, next(iter(scores.values()), {})
        if self.pattern == "element":
            return _elements(layout, given, budgets(self.allocation, layout, budget), group)
        if self.pattern == "row":
            sizes = {name: _row_size(layout, name) for name in given}
            rows = [layout.numels[name] // size if size else 0 for name, size in sizes.items()]
            order = self._drawn(sum(rows), step)
            if not drawn:
                order = _above_all_zeros(torch.cat(_means(layout, given, sizes, group)), order)
            return self._rows(layout, given, order.split(rows), sizes, budget)
        units: dict[str, list[str]] = {}
        for name in layout.shapes:
            units.setdefault(name if self.pattern == "tensor" else str(layout.stages[name]), []).append(name)
        numels = [sum(layout.numels[name] for name in names) for names in units.values()]
        order = self._drawn(len(units), step)
        if not drawn:
            means = dict(zip(given, _means(layout, given, layout.numels, group), strict=True))
            sums = [sum(float(means[name]) * layout.numels[name] for name in names) for names in units.values()]
            of_units = torch.tensor([s / n for s, n in zip(sums, numels, strict=True)], dtype=torch.float64)
            order = _above_all_zeros(of_units, order)
        if self.independent:
            keep = order >= min(sparsity_at(self.sparsity, step), float(order.max()))  # one at the least
        else:
            keep = greedy_units(order, torch.tensor(numels), budget)
        names = {name for kept, names in zip(keep.tolist(), units.values(), strict=True) if kept for name in names}
        return {name: None for name in layout.shapes if name in names}

    def draws_zeros(self, layout: Layout, scores: Mapping[Score, Scores], group: ShardGroup, step: int) -> bool:
        """Where fewer single weights have a score above 0 than are to be perturbed."""
        if self.pattern != "element" or scores.keys() <= {"random"}:
            return False
        [given] = scores.values()
        shares = budgets(self.allocation, layout, int(layout.total * (1.0 - sparsity_at(self.sparsity, step))))
        above = group.all_reduce(torch.stack([(score > 0).sum() for score in given.values()]))
        have = [int(above.sum())] if len(shares) == 1 else above.tolist()
        return any(few < share for few, share in zip(have, shares, strict=True))

    def _drawn(self, units: int, step: int) -> Tensor:
        """A random number of each unit, the same on all processes: float64 of shape (units,)."""
        numbers = random.Random(f"units {self.seed} {step}")
        return torch.tensor([numbers.random() for _ in range(units)], dtype=torch.float64)

    def _rows(
        self, layout: Layout, scores: Scores, of_rows: Sequence[Tensor], sizes: Mapping[str, int], budget: int
    ) -> Mapping[str, Subset | None]:
        shares = budgets(self.allocation, layout, budget)
        lengths = [len(values) for values in of_rows]
        each = torch.cat([torch.full((n,), size) for n, size in zip(lengths, sizes.values(), strict=True)])
        if len(shares) == 1:
            keep = greedy_units(torch.cat([*of_rows]), each, budget).split(lengths)
        else:
            triples = zip(of_rows, each.split(lengths), shares, strict=True)
            keep = tuple(greedy_units(values, size, k) for values, size, k in triples)
        return {
            name: Rows(kept, sizes[name], layout.starts.get(name, 0), s.numel(), s.device)
            for (name, s), kept in zip(scores.items(), keep, strict=True)
        }


def _above_all_zeros(means: Tensor, numbers: Tensor) -> Tensor:
    """`means`, in which those of 0 are negative random numbers, by `numbers` in [0, 1)."""
    return torch.where(means == 0.0, numbers - 1.0, means)


def _row_size(layout: Layout, name: str) -> int:
    """Elements of a slice along the first dimension."""
    shape, numel = layout.shapes[name], layout.numels[name]
    return numel // shape[0] if shape and numel else numel


def _means(layout: Layout, scores: Scores, sizes: Mapping[str, int], group: ShardGroup) -> list[Tensor]:
    starts, numels = [layout.starts.get(name, 0) for name in scores], [layout.numels[name] for name in scores]
    return unit_means(list(scores.values()), starts, numels, [sizes[name] for name in scores], group)


def _elements(layout: Layout, scores: Scores, shares: list[int], group: ShardGroup) -> dict[str, Subset | None]:
    segments = None if len(shares) == 1 else list(range(len(shares)))
    packed = top_k(list(scores.values()), shares, group, segments=segments)
    return {name: BitMask(bits, s.numel()) for (name, s), bits in zip(scores.items(), packed, strict=True)}


@register_mask(ElementMask, "single weights of the highest scores; or `dynamic` (SSAM-D)", "arXiv 2210.05177")
def build_element(section: ElementMask, run: RunInfo) -> Mask:
    """The mask of its section: by scores, or dynamic."""
    if section.dynamic is not None:
        return dynamic_mask(section, section.dynamic, run)
    assert section.score is not None  # only `dynamic` has none
    return _scored(section, section.score, section.allocation, run)


@register_mask(RowMask, "output channels (rows of a weight) of the highest mean scores")
def build_row(section: RowMask, run: RunInfo) -> Mask:
    """The mask of its section."""
    return _scored(section, section.score, section.allocation, run)


@register_mask(TensorMask, "whole tensors of the highest mean scores (structured SSAM)", "arXiv 2306.17504")
def build_tensor(section: TensorMask, run: RunInfo) -> Mask:
    """The mask of its section."""
    return _scored(section, section.score, "global", run, section.independent)


@register_mask(BlockMask, "whole blocks of the network of the highest mean scores")
def build_block(section: BlockMask, run: RunInfo) -> Mask:
    """The mask of its section."""
    return _scored(section, section.score, "global", run, section.independent)


def _scored(
    section: ElementMask | RowMask | TensorMask | BlockMask,
    score: Score,
    allocation: Allocation,
    run: RunInfo,
    independent: bool = False,
) -> Scored:
    return Scored(
        section.pattern,
        annealed_sparsity(section, run),
        score=score,
        allocation=allocation,
        every=run.steps_between_refreshes(section),
        seed=run.seed,
        independent=independent,
    )

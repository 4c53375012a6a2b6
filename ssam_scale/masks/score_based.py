"""Masks that are chosen by scores: when one is refreshed, what it needs for that, and which plan it makes of it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from ssam_scale.anneal import cosine_annealed
from ssam_scale.checks import check_number
from ssam_scale.config.mask_sections import BudgetedMask, SampleScore, Score

from .plan import Layout, Plan, first_block
from .registry import RunInfo
from .shard_group import ShardGroup
from .subset import BitMask, Rows, Subset, popcount

Scores: TypeAlias = Mapping[str, Tensor]
"""Local float32 scores of every parameter, shaped like its shard, by name and in the model's order."""


class Annealed:
    """A sparsity that moves along half a cosine from `first` to `last` over `steps` steps, and stays there.

    Raises:
        ValueError: a sparsity is outside [0, 1), or `steps` is not positive.
    """

    def __init__(self, first: float, last: float, steps: int) -> None:
        for sparsity in (first, last):
            check_sparsity(sparsity)
        check_number("steps", steps, "at least 1", lambda n: n >= 1, whole=True)
        self.first, self.last, self.steps = first, last, steps

    def __call__(self, step: int) -> float:
        """The sparsity of a mask that is chosen at `step`."""
        return cosine_annealed(self.first, self.last, step / self.steps)


Sparsity: TypeAlias = float | Annealed


def annealed_sparsity(section: BudgetedMask, run: RunInfo) -> Sparsity:
    """The sparsity that a section of the configuration says: the same in the whole run, or one that is annealed."""
    if section.sparsity_final is None:
        return section.sparsity
    return Annealed(section.sparsity, section.sparsity_final, run.steps)


def sparsity_at(sparsity: Sparsity, step: int) -> float:
    """The sparsity of a mask that is chosen at `step`."""
    return sparsity(step) if isinstance(sparsity, Annealed) else sparsity


def check_one_of(what: str, given: object, choices: Sequence[object]) -> None:
    """Raise a ValueError unless `given` is one of `choices`."""
    if given not in choices:
        raise ValueError(f"{what} is {given!r}; one of {', '.join(map(str, choices))} is needed")


def check_sparsity(sparsity: Sparsity) -> None:
    """Raise unless `sparsity` is a number in [0, 1): a ValueError, or a TypeError."""
    if not isinstance(sparsity, Annealed):
        check_number("sparsity", sparsity, "a share in [0, 1)", lambda share: 0.0 <= share < 1.0)


class Refreshed:
    """A mask that is computed from scores when it is refreshed, and stays what it is until the next refresh.

    Args:
        kinds: every score that a refresh may ever need.
        every: steps between two refreshes; None: one before the first step, and then only when told to.
        seed: of random scores.

    Attributes:
        kept_as: what is saved of it: of each parameter packed bits, a flag for each row, or one for the whole; or what
            it draws cuts by.
        chosen_at: the step before which it was refreshed last; -1 before the first refresh.

    Raises:
        ValueError: `every` is not positive.
    """

    kept_as: Literal["bits", "rows", "whole", "cuts"] = "bits"

    def __init__(self, kinds: Sequence[Score], every: int | None, seed: int) -> None:
        for kind in kinds:
            check_one_of("score", kind, get_args(Score))
        if every is not None:
            check_number("every", every, "at least 1, or None,", lambda steps: steps >= 1, whole=True)
        self.kinds = kinds
        self.every = every
        self.seed = seed
        self.chosen_at = -1

    def is_due(self, step: int) -> bool:
        """Whether to refresh before step number `step`."""
        if self.chosen_at < 0:
            return True
        return self.every is not None and step % self.every == 0 and step != self.chosen_at

    def wanted(self) -> Sequence[Score]:
        """The scores that the next refresh needs. The first is at random where there is nothing accumulated yet."""
        return ("random",) if self.chosen_at < 0 and "accumulated" in self.kinds else self.kinds

    def needs_samples(self) -> bool:
        """Whether one of them is computed from samples."""
        return not set(get_args(SampleScore)).isdisjoint(self.wanted())

    def draws_zeros(self, layout: Layout, scores: Mapping[Score, Scores], group: ShardGroup, step: int) -> bool:
        """Whether `refresh` is to be given scores of which those of 0 are random numbers below it. Collective."""
        return False

    def refresh(self, layout: Layout, scores: Mapping[Score, Scores], group: ShardGroup, step: int) -> None:
        """Compute the mask anew, before step number `step`. Collective.

        Args:
            layout: the weights to choose from.
            scores: what `wanted` named.
            group: the processes that they are sharded over.
            step: number of the next step.

        Raises:
            FloatingPointError: a tensor has a score that is not finite; the mask stays what it was.
            ValueError: nothing would be perturbed; the mask stays what it was.
        """
        raise NotImplementedError


class ScoreBased(Refreshed):
    """A mask whose plan is that of the last refresh, in which `choose` picked weights by their scores.

    Args:
        kinds: every score that a refresh may ever need.
        every: steps between two refreshes; None: one before the first step, and then only when told to.
        seed: of random scores.

    Attributes:
        selected: the plan of the last refresh; None before the first.
        turnover: share of its perturbed weights that the refresh before had not chosen; NaN for the first.

    Raises:
        ValueError: `every` is not positive.
    """

    def __init__(self, kinds: Sequence[Score], every: int | None, seed: int) -> None:
        super().__init__(kinds, every, seed)
        self.selected: Plan | None = None
        self.turnover = math.nan
        self._chosen_from: set[str] = set()
        self._looked_at: Layout | None = None

    def check(self, layout: Layout) -> None:
        """Any weights will do."""

    def plan(self, layout: Layout, step: int) -> Plan:
        """That of the last refresh, without what has been frozen or left alone since.

        Raises:
            RuntimeError: there was none yet.
        """
        if self.selected is None:
            raise RuntimeError(
                "the mask has no scores yet: call SparseSAM.refresh(loss_fn, batch) before the first step"
            )
        if layout is not self._looked_at:
            self._tell_of_others(layout)
        if self.selected.weights.keys() <= layout.shapes.keys():
            return self.selected
        kept = {name: subset for name, subset in self.selected.weights.items() if name in layout.shapes}
        return self._plan_of(layout, kept, [self.selected.counts[name] for name in kept])

    def _tell_of_others(self, layout: Layout) -> None:
        """Warn once of weights that could not be chosen at the last refresh, because they were not trained then."""
        self._looked_at = layout
        others = [name for name in layout.shapes if name not in self._chosen_from]
        if others and self._chosen_from:
            self._chosen_from |= set(others)
            warnings.warn(
                f"{len(others)} parameters that are trained now (the first: {others[0]}) were frozen, or without a "
                "radius, when the mask was chosen, and are not perturbed until the next refresh: call opt.refresh",
                stacklevel=2,
            )

    def choose(
        self, layout: Layout, scores: Mapping[Score, Scores], group: ShardGroup, step: int
    ) -> Mapping[str, Subset | None]:
        """What to perturb of each parameter's local shard, by name; None: all of it. Collective.

        Parameters may be left out that are perturbed on no process. The arguments are those of `refresh`.
        """
        raise NotImplementedError

    def refresh(self, layout: Layout, scores: Mapping[Score, Scores], group: ShardGroup, step: int) -> None:
        """See `Refreshed`."""
        for kind, by_name in scores.items():
            check_finite(kind, by_name, group)
        subsets = self.choose(layout, scores, group, step)
        counts = _counts(layout, subsets, group)
        chosen = {name: subset for name, subset in subsets.items() if counts[name]}
        if not chosen:
            raise ValueError(f"{self} leaves nothing of {layout.total} weights to perturb")
        before, self.selected = self.selected, self._plan_of(layout, chosen, [counts[name] for name in chosen])
        self.chosen_at, self._chosen_from = step, set(layout.shapes)
        if before is not None:
            new = self.selected.perturbed - _perturbed_by_both(self.selected, before, group)
            self.turnover = new / self.selected.perturbed

    def restore(
        self, layout: Layout, subsets: Mapping[str, Subset | None], counts: Sequence[int], chosen_at: int
    ) -> None:
        """Take back a saved mask, in the place of a refresh.

        Args:
            layout: the weights to choose from.
            subsets: what is perturbed of each parameter's local shard; empty: it was saved before the first refresh.
            counts: perturbed weights of each of them over all processes.
            chosen_at: the step of the saved refresh.
        """
        self.selected = self._plan_of(layout, subsets, counts) if subsets else None
        self.chosen_at, self._chosen_from = chosen_at, set(layout.shapes)

    def _plan_of(self, layout: Layout, subsets: Mapping[str, Subset | None], counts: Sequence[int]) -> Plan:
        """The plan, in which a subset that is everything is None: the same for a mask computed and one restored.

        Only whole tensors can leave the first blocks alone, and so have a cut: single weights and rows are practically
        always chosen in all blocks, and count as that, so that no input of a prefix is kept for nothing.
        """
        by_name = dict(zip(subsets, counts, strict=True))
        weights = {name: None if by_name[name] == layout.numels[name] else subset for name, subset in subsets.items()}
        if self.kept_as == "whole":
            return Plan(first_block(layout, subsets), weights, by_name, may_cut=layout.depth > 1)
        return Plan(0, weights, by_name)


def check_finite(kind: str, scores: Scores, group: ShardGroup) -> None:
    """Raise a FloatingPointError that names the first tensor with a score that is not finite. Collective."""
    # A sum is not finite where one of its terms is not, and costs no temporary; the terms of a sum that overflows are
    # looked at themselves.
    bad = torch.stack([~s.sum().isfinite() for s in scores.values()]).int()
    if not int(group.all_reduce(bad).sum()):
        return
    bad = torch.stack([(~s.isfinite()).any() for s in scores.values()]).int()
    if broken := [name for name, b in zip(scores, group.all_reduce(bad).tolist(), strict=True) if b]:
        raise FloatingPointError(f"{kind} scores of {broken[0]} are not finite ({len(broken)} of {len(bad)} tensors)")


def _counts(layout: Layout, subsets: Mapping[str, Subset | None], group: ShardGroup) -> dict[str, int]:
    """How many elements of each parameter are in its subset, over all processes. Collective where one is a part."""
    parts = {name: subset for name, subset in subsets.items() if subset is not None}
    sums = _sums([subset.count for subset in parts.values()], [*parts.values()], group)
    return {**{name: layout.numels[name] for name in subsets}, **dict(zip(parts, sums, strict=True))}


def _perturbed_by_both(one: Plan, other: Plan, group: ShardGroup) -> int:
    """How many weights two plans of one kind of mask perturb both, over all processes. Collective like `_counts`."""
    whole, here, parts = 0, 0, []
    for name, subset in one.weights.items():
        if name not in other.weights:
            continue
        second = other.weights[name]
        if subset is None or second is None:
            whole += min(one.counts[name], other.counts[name])
        else:
            here += _count_of_both(subset, second)
            parts.append(subset)
    return whole + sum(_sums([here], parts, group))


def _sums(counts: Sequence[int], of: Sequence[Subset], group: ShardGroup) -> list[int]:
    """Each count summed over all processes: where the subsets are, as collectives of GPUs work on their memory."""
    if not of:
        return list(counts)
    result: list[int] = group.all_reduce(torch.tensor(counts, dtype=torch.int64, device=of[0].device)).tolist()
    return result


def _count_of_both(one: Subset, other: Subset) -> int:
    """How many elements of a shard are in both."""
    if isinstance(one, BitMask) and isinstance(other, BitMask):
        return popcount(one.packed & other.packed)
    if isinstance(one, Rows) and isinstance(other, Rows):
        return Rows(one.keep & other.keep, one.size, one.start, one.numel, one.device).count
    raise TypeError(f"{type(one).__name__} and {type(other).__name__} are subsets of two kinds of mask")

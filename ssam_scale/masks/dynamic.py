"""SSAM-D: drop some of the perturbed weights and grow others, at every refresh (arXiv 2210.05177, section 4.3)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ssam_scale.checks import check_number
from ssam_scale.config.mask_sections import DynamicChoice, ElementMask

from .plan import Layout
from .registry import RunInfo
from .score_based import Score, ScoreBased, Scores, Sparsity, annealed_sparsity, check_sparsity, sparsity_at
from .selection import top_k
from .shard_group import ShardGroup
from .subset import BitMask, Subset, pack


class Dynamic(ScoreBased):
    """Single weights: SSAM-D: int(N(1 − sparsity)) of N, random at first; each refresh drops some and grows others.

    With L weights live, a refresh at step t drops all but the int(L(1 − d(1 + cos(π t / steps)) / 2)) of highest `drop`
    score and grows as many of highest `grow` score as the budget then lacks, among those that were not live: what is
    dropped does not return at once. Where fewer were not live than were to be dropped, fewer are dropped; so the
    density is exact at every sparsity.

    Args:
        sparsity: share of the weights that is not perturbed, in [0, 1), or one that changes over time.
        steps: of the run, over which the drop rate falls from d to 0.
        drop_rate: d, in [0, 1].
        drop: score of which the lowest are dropped.
        grow: score of which the highest are grown.
        every: steps between two refreshes.
        seed: of random scores and of the first choice.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        sparsity: Sparsity = 0.5,
        *,
        steps: int,
        drop_rate: float = 0.5,
        drop: Score = "gradient",
        grow: Score = "random",
        every: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(tuple(dict.fromkeys((drop, grow))), every, seed)
        check_sparsity(sparsity)
        check_number("steps", steps, "at least 1", lambda n: n >= 1, whole=True)
        check_number("drop_rate", drop_rate, "a share in [0, 1]", lambda share: 0.0 <= share <= 1.0)
        self.sparsity = sparsity
        self.steps = steps
        self.drop_rate = drop_rate
        self.drop: Score = drop
        self.grow: Score = grow

    def __repr__(self) -> str:
        return f"a dynamic mask of sparsity {self.sparsity}"

    def wanted(self) -> Sequence[Score]:
        """Random ones for the first choice."""
        return ("random",) if self.selected is None else self.kinds

    def choose(
        self, layout: Layout, scores: Mapping[Score, Scores], group: ShardGroup, step: int
    ) -> Mapping[str, Subset | None]:
        """See `ScoreBased`."""
        budget = int(layout.total * (1.0 - sparsity_at(self.sparsity, step)))
        names = list(next(iter(scores.values())))
        if self.selected is None:
            chosen = top_k(list(scores["random"].values()), [budget], group)
        else:
            live = [self._live(name, s) for name, s in scores[self.drop].items()]
            dead = [
                ~bits & pack(torch.ones_like(s, dtype=torch.bool))
                for bits, s in zip(live, scores[self.drop].values(), strict=True)
            ]
            kept = self._kept(layout.total, budget, step)
            keep = top_k(list(scores[self.drop].values()), [kept], group, candidates=live)
            grown = top_k(list(scores[self.grow].values()), [budget - kept], group, candidates=dead)
            chosen = [one | other for one, other in zip(keep, grown, strict=True)]
        shards = next(iter(scores.values()))
        return {name: BitMask(bits, shards[name].numel()) for name, bits in zip(names, chosen, strict=True)}

    def _kept(self, total: int, budget: int, step: int) -> int:
        """How many of those that are live stay."""
        assert self.selected is not None
        live = self.selected.perturbed
        rate = self.drop_rate * 0.5 * (1.0 + math.cos(math.pi * min(step / self.steps, 1.0)))
        grown = budget - int(live * (1.0 - rate))
        return min(budget - min(grown, total - live), live, budget)

    def _live(self, name: str, scores: Tensor) -> Tensor:
        """The packed choice so far of a shard."""
        assert self.selected is not None
        if name not in self.selected.weights:
            return pack(torch.zeros_like(scores, dtype=torch.bool))
        part = self.selected.weights[name]
        if part is None:
            return pack(torch.ones_like(scores, dtype=torch.bool))
        assert isinstance(part, BitMask)
        return part.packed


def dynamic_mask(section: ElementMask, how: DynamicChoice, run: RunInfo) -> Dynamic:
    """The mask of a section of pattern `element` that has a section `dynamic`."""
    return Dynamic(
        annealed_sparsity(section, run),
        steps=run.steps,
        drop_rate=how.drop_rate,
        drop=how.drop,
        grow=how.grow,
        every=run.steps_between_refreshes(section),
        seed=run.seed,
    )

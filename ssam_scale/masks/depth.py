"""The suffix of the network from a cut on: a fixed cut, or a moving one that is drawn anew at each step."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from numbers import Real
from typing import TypeAlias

import torch
from torch import Tensor

from ssam_scale.anneal import cosine_annealed
from ssam_scale.checks import check_number
from ssam_scale.config.mask_sections import DepthMask

from .plan import Layout, Mask, Plan
from .registry import RunInfo, register_mask
from .score_based import Refreshed, Score, Scores, check_finite
from .selection import unit_means
from .shard_group import ShardGroup

Range: TypeAlias = tuple[float, float]

_NO_BLOCKS = (
    "a mask with a cut needs a model in stages to be cut between, and this one has none: give SparseSAM a StagedModel, "
    "such as StagedModel(model, stages_of(model)) for a known family, stages_of(model, names of blocks) for any model"
)


@dataclass(frozen=True)
class AnnealedCut:
    """A range of cuts that moves along half a cosine from `first` to `last` over `steps` steps, and stays there.

    Attributes:
        first, last: lowest and highest depth, as shares of the number of blocks.
        steps: how long it takes.

    Raises:
        ValueError: shares outside [0, 1] or in the wrong order, or `steps` is not positive.
    """

    first: Range
    last: Range
    steps: int

    def __post_init__(self) -> None:
        for each in (self.first, self.last):
            _check_range(each)
        check_number("steps", self.steps, "at least 1", lambda steps: steps >= 1, whole=True)

    def __call__(self, step: int) -> Range:
        """The range at `step`."""
        done = step / self.steps
        low, high = (cosine_annealed(a, b, done) for a, b in zip(self.first, self.last, strict=True))
        return low, high


class Depth:
    """All weights from a cut on, drawn uniformly anew at each step (a moving cut) or fixed.

    Args:
        cut: lowest and highest depth of the cut as shares of the number of blocks, in [0, 1]; or a range that moves. A
            share s stands for the block of index round(s · blocks), at most the last; equal shares, or one number, fix
            the cut.
        seed: of the draws. The draw is a function of seed and step alone, so every process makes the same one and a
            resumed run continues the sequence.

    Raises:
        ValueError: shares outside [0, 1] or in the wrong order.
    """

    def __init__(self, cut: float | Range | AnnealedCut = (0.0, 1.0), seed: int = 0) -> None:
        if not isinstance(cut, AnnealedCut):
            if cut is True or cut is False:
                raise ValueError(f"cut is {cut} (bool); {_CUT_NEEDED}")
            cut = (float(cut), float(cut)) if isinstance(cut, (int, float, Real)) else cut
            _check_range(cut)
        self.cut = cut
        self.seed = seed

    def check(self, layout: Layout) -> None:
        """There must be blocks to cut between.

        Raises:
            ValueError: the model is not in stages.
        """
        if layout.depth == 1:
            raise ValueError(_NO_BLOCKS)

    def cuts(self, depth: int, step: int) -> range:
        """The cuts that step number `step` may draw, of a network of `depth` blocks."""
        shares = self.cut(step) if isinstance(self.cut, AnnealedCut) else self.cut
        low, high = (min(round(share * depth), depth - 1) for share in shares)
        return range(low, high + 1)

    def probabilities(self, depth: int, step: int) -> list[float]:
        """Of the cut at each of `depth` blocks, in step number `step`; they add up to 1."""
        cuts = self.cuts(depth, step)
        return [1.0 / len(cuts) if cut in cuts else 0.0 for cut in range(depth)]

    def plan(self, layout: Layout, step: int) -> Plan:
        """The suffix of this step's cut."""
        likely = {cut: p for cut, p in enumerate(self.probabilities(layout.depth, step)) if p > 0.0}
        cut, *others = likely
        if others:
            [cut] = random.Random(f"cut {self.seed} {step}").choices(list(likely), list(likely.values()))
        return layout.suffix(cut, may_cut=self._deepest(layout.depth) > 0)

    def _deepest(self, depth: int) -> int:
        """The highest cut that any step may draw."""
        ends = (0, self.cut.steps) if isinstance(self.cut, AnnealedCut) else (0,)
        return max(self.cuts(depth, step)[-1] for step in ends)


class DepthByCost(Refreshed, Depth):
    """All weights from a cut on, which is drawn anew at each step by what it is worth and what it costs.

    The probability of cut c is proportional to F(c) / T(c) within the range: F(c) is the Fisher mass of the weights
    from block c on (the sum over samples of squared per-sample gradients, added up over these weights), measured by
    `SparseSAM.refresh`, and T(c) the time of an ascent with that cut. The expected mass over the expected time is then
    never below that of uniform draws from the range (by Cauchy and Schwarz; equal only where F / T is the same
    everywhere). It is not the highest there is: that of one fixed cut, or of none, may be higher, and perturbs less or
    costs more.

    Nothing corrects for the unequal probabilities. A weight in block b is perturbed in the share of the steps in which
    the cut is not behind b, whatever the distribution; under this one that share is another than under uniform draws,
    and it moves with the refreshes. A perturbation is not an estimate of the dense one whose mean must be right, and to
    scale it by the inverse of a probability would change its radius; so the distribution is part of the method.

    Both are known after `seconds` is set and the first refresh is made; until then there is no plan.

    Args:
        cut: as of `Depth`.
        seconds: T(c) of the cut at each block, in any unit. From the times of blocks, these are the sums from each
            block on (`suffix_sums`); `ascent_seconds` measures whole ascents. None: set the attribute before the first
            refresh.
        every: steps between two refreshes; None: only the first one.
        seed: of the draws.

    Attributes:
        masses: Fisher mass of each block by itself; None before the first refresh.

    Raises:
        ValueError: an argument is out of its range.
    """

    kept_as = "cuts"

    def __init__(
        self,
        cut: float | Range | AnnealedCut = (0.0, 1.0),
        *,
        seconds: Sequence[float] | None = None,
        every: int | None = None,
        seed: int = 0,
    ) -> None:
        Refreshed.__init__(self, ("fisher",), every, seed)
        Depth.__init__(self, cut, seed)
        self._depth: int | None = None  # not known before `check`
        self._seconds: tuple[float, ...] | None = None
        self.masses: tuple[float, ...] | None = None
        if seconds is not None:
            self.seconds = seconds

    def __repr__(self) -> str:
        return "a moving cut drawn by cost"

    @property
    def seconds(self) -> Sequence[float] | None:
        """The time of an ascent with the cut at each block; None before it is set."""
        return self._seconds

    @seconds.setter
    def seconds(self, seconds: Sequence[float]) -> None:
        if bad := [t for t in seconds if not 0.0 < t < math.inf]:
            raise ValueError(f"one of the seconds of an ascent is {bad[0]}; positive times are needed")
        self._check_depth(seconds, self._depth)
        self._seconds = tuple(float(t) for t in seconds)

    def check(self, layout: Layout) -> None:
        """There must be blocks, and a time for each.

        Raises:
            ValueError: there are none, or other times.
        """
        Depth.check(self, layout)
        if self._seconds is not None:
            self._check_depth(self._seconds, layout.depth)
        self._depth = layout.depth

    @staticmethod
    def _check_depth(seconds: Sequence[float], depth: int | None) -> None:
        if depth is not None and len(seconds) != depth:
            raise ValueError(
                f"there are {len(seconds)} times of an ascent, and the model has {depth} blocks; one for the cut at "
                "each block is needed"
            )

    def probabilities(self, depth: int, step: int) -> list[float]:
        """See `Depth`.

        Raises:
            RuntimeError: Fisher mass or times are not known yet.
        """
        if self._seconds is None:
            raise RuntimeError("the mask has no times yet: set mask.seconds = ascent_seconds(opt, loss_fn, batch)")
        if self.masses is None:
            raise RuntimeError("the mask has no scores yet: call SparseSAM.refresh(loss_fn, batch) before a step")
        worth = probabilities_by_cost(suffix_sums(self.masses), self._seconds, self.cuts(depth, step))
        if worth is None:  # a range that moves to where nothing has any mass
            return super().probabilities(depth, step)
        return worth

    def refresh(self, layout: Layout, scores: Mapping[Score, Scores], group: ShardGroup, step: int) -> None:
        """See `Refreshed`."""
        fisher = scores["fisher"]
        check_finite("fisher", fisher, group)
        numels = [layout.numels[name] for name in fisher]
        starts = [layout.starts.get(name, 0) for name in fisher]
        means = unit_means(list(fisher.values()), starts, numels, numels, group)
        masses = [0.0] * layout.depth
        for name, mean, numel in zip(fisher, means, numels, strict=True):
            masses[layout.stages[name]] += float(mean.sum()) * numel
        low, *_ = cuts = self.cuts(layout.depth, step)
        if not any(masses[low:]):
            raise ValueError(f"the Fisher mass of the weights from block {low} on is 0; cuts {cuts} are worth nothing")
        self.masses = tuple(masses)
        self.chosen_at = step

    def state_dict(self) -> dict[str, Tensor]:
        """`chosen_at`, and what cuts are drawn by: float64 of shape (blocks,); −1 for what is not known yet."""
        unknown = [-1.0] * (self._depth or 1)
        return {
            "chosen_at": torch.tensor(self.chosen_at),
            "fisher_mass": torch.tensor(self.masses or unknown, dtype=torch.float64),
            "ascent_seconds": torch.tensor(self._seconds or unknown, dtype=torch.float64),
        }

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Take back what `state_dict` returned; the times, too, so that the same cuts are drawn as without a break.

        Raises:
            ValueError: it is of another mask or another network; nothing was loaded then.
        """
        saved: dict[str, tuple[float, ...]] = {}
        for name in ("fisher_mass", "ascent_seconds"):
            if name not in state_dict:
                raise ValueError(f"the saved state has no {name}, which {self} needs")
            if len(state_dict[name]) != self._depth:
                raise ValueError(f"the saved {name} is of {len(state_dict[name])} blocks, the model has {self._depth}")
            saved[name] = tuple(state_dict[name].tolist())
        masses, seconds = saved["fisher_mass"], saved["ascent_seconds"]
        self.masses = masses if min(masses) >= 0.0 else None
        if min(seconds) > 0.0:
            self._seconds = seconds
        self.chosen_at = int(state_dict["chosen_at"])


def suffix_sums(values: Sequence[float]) -> list[float]:
    """Of each block, the sum of the values of it and of all blocks behind it."""
    return list(accumulate(reversed(values)))[::-1]


def probabilities_by_cost(masses: Sequence[float], seconds: Sequence[float], cuts: range) -> list[float] | None:
    """Probabilities proportional to masses[c] / seconds[c] within `cuts`, 0 elsewhere; None where there is no mass.

    Args:
        masses: of the weights behind the cut at each block, at least 0.
        seconds: time of an ascent with the cut at each block, above 0.
        cuts: those that may be drawn.
    """
    # Mantissas and exponents apart: the quotient of a tiny mass would underflow, and count as no mass at all.
    quotients = {}
    for cut in cuts:
        mass, time = math.frexp(masses[cut]), math.frexp(seconds[cut])
        if mass[0]:
            quotients[cut] = mass[0] / time[0], mass[1] - time[1]
    if not quotients:
        return None
    largest = max(exponent for _, exponent in quotients.values())
    scaled = {cut: math.ldexp(quotient, exponent - largest) for cut, (quotient, exponent) in quotients.items()}
    total = math.fsum(scaled.values())
    return [scaled.get(cut, 0.0) / total for cut in range(len(masses))]


_CUT_NEEDED = "one share in [0, 1], or two, the smaller first, are needed"


def _check_range(cut: Range) -> None:
    if not isinstance(cut, Sequence) or len(cut) != 2 or not all(isinstance(share, Real) for share in cut):
        raise ValueError(f"cut is {cut!r} ({type(cut).__name__}); {_CUT_NEEDED}")
    if not 0.0 <= cut[0] <= cut[1] <= 1.0:
        raise ValueError(f"cut is {cut}; {_CUT_NEEDED}")


@register_mask(DepthMask, "all weights from a block (the cut) on; the prefix before it runs once for both passes")
def build(section: DepthMask, run: RunInfo) -> Mask:
    """The mask of its section: a cut at one depth, or one that is drawn anew at each step."""
    if section.draw == "cost":
        return DepthByCost(section.cut, every=run.steps_between_refreshes(section), seed=run.seed)
    if section.cut_final is not None:
        return Depth(AnnealedCut(section.cut, section.cut_final, run.steps), seed=run.seed)
    return Depth(section.cut, seed=run.seed)

"""What masks have in common that are chosen by scores, and chosen anew when they are refreshed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from ssam_scale.anneal import along_half_cosine
from ssam_scale.sharding import ProcessGroup

from .plan import Layout, Plan
from .static import first_block
from .subset import Bits, Part, Rows, popcount

Score: TypeAlias = Literal["fisher", "gradient", "accumulated", "weight", "random"]
"""What a mask is chosen by:

| score | of a weight | needs samples |
|---|---|---|
| `fisher` | sum over samples of its squared gradient (arXiv 2210.05177, equation 9) | yes |
| `gradient` | magnitude of its gradient, summed over samples | yes |
| `accumulated` | running mean of its squared descent gradient, noted in every step | no |
| `weight` | its magnitude | no |
| `random` | a draw from the mask's seed and the number of the step | no |
"""
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
        if steps < 1:
            raise ValueError(f"steps is {steps}; at least 1 is needed")
        self.first, self.last, self.steps = first, last, steps

    def __call__(self, step: int) -> float:
        """The sparsity of a mask that is chosen at `step`."""
        return along_half_cosine(self.first, self.last, step / self.steps)


Sparsity: TypeAlias = float | Annealed


def sparsity_at(sparsity: Sparsity, step: int) -> float:
    """The sparsity of a mask that is chosen at `step`."""
    return sparsity(step) if isinstance(sparsity, Annealed) else sparsity


def check_one_of(what: str, given: object, choices: Sequence[object]) -> None:
    """Raise a ValueError unless `given` is one of `choices`."""
    if given not in choices:
        raise ValueError(f"{what} is {given!r}; one of {', '.join(map(str, choices))} is needed")


def check_sparsity(sparsity: Sparsity) -> None:
    """Raise a ValueError unless `sparsity` is in [0, 1)."""
    if not isinstance(sparsity, Annealed) and not 0.0 <= sparsity < 1.0:
        raise ValueError(f"sparsity is {sparsity}; a share in [0, 1) is needed")


class Refreshed:
    """A mask that scores decide about: made by them when it is refreshed, and kept until the next refresh.

    Args:
        kinds: every score that a refresh may ever need.
        every: steps between two refreshes; None: make it once and keep it, unless told otherwise.
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
        if every is not None and every < 1:
            raise ValueError(f"every is {every}; at least 1, or None, is needed")
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
        """The scores that the next refresh needs. Until something has accumulated, it is made at random instead."""
        return ("random",) if self.chosen_at < 0 and "accumulated" in self.kinds else self.kinds

    def select(self, layout: Layout, scores: Mapping[Score, Scores], sharding: ProcessGroup, step: int) -> None:
        """Refresh before step number `step`. Collective.

        Args:
            layout: the weights to choose from.
            scores: what `wanted` named.
            sharding: over whom they are spread.
            step: number of the next step.

        Raises:
            FloatingPointError: a tensor has a score that is not finite; the mask stays what it was.
            ValueError: nothing would be perturbed; the mask stays what it was.
        """
        raise NotImplementedError


class Chosen(Refreshed):
    """A mask whose plan is the last choice that was made by scores.

    Args:
        kinds: every score that a choice may ever need.
        every: steps between two choices; None: choose once and keep it, unless told otherwise.
        seed: of random scores.

    Attributes:
        selected: the plan of the last choice; None before the first.
        turnover: share of its weights that the choice before did not have; not a number for the first.

    Raises:
        ValueError: `every` is not positive.
    """

    def __init__(self, kinds: Sequence[Score], every: int | None, seed: int) -> None:
        super().__init__(kinds, every, seed)
        self.selected: Plan | None = None
        self.turnover = math.nan

    def check(self, layout: Layout) -> None:
        """Look at the weights that the mask is going to choose from."""

    def plan(self, layout: Layout, step: int) -> Plan:
        """The last choice.

        Raises:
            RuntimeError: there was none yet.
        """
        if self.selected is None:
            raise RuntimeError(
                "the mask has no scores yet: call SparseSAM.refresh(loss_fn, batch) before the first step"
            )
        return self.selected

    def choose(
        self, layout: Layout, scores: Mapping[Score, Scores], sharding: ProcessGroup, step: int
    ) -> Mapping[str, Part | None]:
        """The parts to perturb: of every parameter that has any, on some process."""
        raise NotImplementedError

    def select(self, layout: Layout, scores: Mapping[Score, Scores], sharding: ProcessGroup, step: int) -> None:
        """See `Refreshed`."""
        for kind, by_name in scores.items():
            check_finite(kind, by_name, sharding)
        parts = self.choose(layout, scores, sharding, step)
        shards = {name: s.numel() for name, s in next(iter(scores.values())).items()}
        device = next(iter(next(iter(scores.values())).values())).device
        held = [shards[n] if p is None else p.count for n, p in parts.items()]
        counts = _over_all(held, sharding, device)
        chosen = {name: part for (name, part), count in zip(parts.items(), counts, strict=True) if count}
        if not chosen:
            raise ValueError(f"{self} leaves nothing of {layout.total} weights to perturb")
        before, self.selected = self.selected, self._simplest(layout, chosen, [c for c in counts if c])
        self.chosen_at = step
        if before is not None:
            new = [_new(p, n in before.weights, before.weights.get(n), shards[n]) for n, p in parts.items()]
            self.turnover = sum(_over_all(new, sharding, device)) / self.selected.perturbed

    def restore(self, layout: Layout, parts: Mapping[str, Part | None], counts: Sequence[int], chosen_at: int) -> None:
        """Take a choice that was saved instead of making one; no parts: of before the first.

        Args:
            layout: the weights to choose from.
            parts: of every parameter that has any.
            counts: of their weights over all processes.
            chosen_at: as it was then.
        """
        self.selected = self._simplest(layout, parts, counts) if parts else None
        self.chosen_at = chosen_at

    def _simplest(self, layout: Layout, parts: Mapping[str, Part | None], counts: Sequence[int]) -> Plan:
        """The plan, in which a part that is everything is None: the same for a choice made and one restored.

        Whole tensors may leave the first blocks alone. Single weights and rows are practically everywhere, and count as
        that, so that nobody has to give both passes the same input for nothing.
        """
        by_name = dict(zip(parts, counts, strict=True))
        weights = {name: None if by_name[name] == layout.numels[name] else part for name, part in parts.items()}
        if self.kept_as == "whole":
            return Plan(first_block(layout, parts), weights, by_name, may_cut=layout.depth > 1)
        return Plan(0, weights, by_name)


def check_finite(kind: str, scores: Scores, sharding: ProcessGroup) -> None:
    """Raise a FloatingPointError that names the first tensor with a score that is not finite. Collective."""
    # A sum is not finite where one of its terms is not, and costs no temporary; the terms of a sum that overflows are
    # looked at themselves.
    bad = torch.stack([~s.sum().isfinite() for s in scores.values()]).int()
    if not int(sharding.all_reduce(bad).sum()):
        return
    bad = torch.stack([(~s.isfinite()).any() for s in scores.values()]).int()
    if broken := [name for name, b in zip(scores, sharding.all_reduce(bad).tolist(), strict=True) if b]:
        raise FloatingPointError(f"{kind} scores of {broken[0]} are not finite ({len(broken)} of {len(bad)} tensors)")


def _over_all(counts: Sequence[int], sharding: ProcessGroup, device: torch.device) -> list[int]:
    # Collectives of a GPU's processes work on its memory.
    result: list[int] = sharding.all_reduce(torch.tensor(counts, dtype=torch.int64, device=device)).tolist()
    return result


def _new(part: Part | None, known: bool, before: Part | None, numel: int) -> int:
    """How many elements of a shard are in `part` and were not in the part before, if there was one."""
    if not known:
        return numel if part is None else part.count
    if before is None:
        return 0
    if part is None:
        return numel - before.count
    if isinstance(part, Bits) and isinstance(before, Bits):
        return popcount(part.packed & ~before.packed)
    if isinstance(part, Rows) and isinstance(before, Rows):
        return Rows(part.keep & ~before.keep, part.size, part.start, part.numel, part.device).count
    raise TypeError(f"{type(part).__name__} and {type(before).__name__} are parts of two masks")

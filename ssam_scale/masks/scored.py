"""Masks that keep what scores highest, chosen anew whenever scores are given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from ssam_scale.sharding import Sharding

from .plan import Layout, Plan
from .selection import greedy_tensors, top_k


def add_squares(scores: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    """Add one sample's squared gradients to `scores` in place: the empirical Fisher (arXiv 2210.05177, equation 9)."""
    torch._foreach_addcmul_(list(scores), list(gradients), list(gradients))


class Scored:
    """The int(N(1 − sparsity)) highest scores of N weights (`element`), or whole tensors of highest mean (`tensor`).

    Scores come from `SparseSAM.refresh`; before the first one there is no plan.

    Args:
        pattern: granularity.
        sparsity: share of the weights that is not perturbed, in [0, 1).

    Raises:
        ValueError: sparsity is outside [0, 1).
    """

    def __init__(self, pattern: Literal["element", "tensor"] = "element", sparsity: float = 0.5) -> None:
        if not 0.0 <= sparsity < 1.0:
            raise ValueError(f"sparsity is {sparsity}; a share in [0, 1) is needed")
        self.pattern = pattern
        self.sparsity = sparsity
        self._plan: Plan | None = None

    @property
    def selected(self) -> Plan | None:
        """The plan of the last refresh."""
        return self._plan

    def plan(self, layout: Layout, step: int) -> Plan:
        """The last refresh's choice.

        Raises:
            RuntimeError: there was no refresh yet.
        """
        if self._plan is None:
            raise RuntimeError(
                "the mask has no scores yet: call SparseSAM.refresh(loss_fn, batch) before the first step"
            )
        return self._plan

    def select(self, layout: Layout, scores: Mapping[str, Tensor], sharding: Sharding) -> None:
        """Choose anew.

        Args:
            layout: the weights to choose from.
            scores: local float32 scores of every parameter, shaped like its shard, by name.
            sharding: over whom they are spread.

        Raises:
            FloatingPointError: a tensor has a score that is not finite; the mask stays what it was.
            ValueError: the sparsity leaves nothing to perturb.
        """
        bad = torch.stack([(~s.isfinite()).any() for s in scores.values()]).int()
        if broken := [name for name, b in zip(scores, sharding.sum_over_shards(bad).tolist(), strict=True) if b]:
            raise FloatingPointError(f"scores of {broken[0]} are not finite ({len(broken)} of {len(bad)} tensors)")
        k = int(layout.total * (1.0 - self.sparsity))
        chosen: dict[str, Tensor | None]
        if self.pattern == "element":
            chosen = dict(zip(scores, top_k(list(scores.values()), k, sharding), strict=True))
            perturbed = k
        else:
            sums = sharding.sum_over_shards(torch.stack([s.double().sum() for s in scores.values()]))
            means = {name: s / layout.numels[name] for name, s in zip(scores, sums.tolist(), strict=True)}
            taken = set(greedy_tensors(means, layout.numels, k))
            chosen = {name: None for name in scores if name in taken}  # in the order in which a saved choice comes back
            perturbed = sum(layout.numels[name] for name in chosen)
        if not perturbed:
            raise ValueError(f"sparsity {self.sparsity} leaves nothing of {layout.total} weights to perturb")
        self._plan = Plan(0, chosen, perturbed)

    def restore(self, plan: Plan | None) -> None:
        """Take a plan that was saved, of before the first refresh if None, instead of a refresh's."""
        self._plan = plan

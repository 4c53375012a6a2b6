"""Squared descent gradients of the steps so far, averaged: a Fisher score that costs no pass."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ssam_scale.sharding import ShardedWeights
from ssam_scale.sharding.chunks import Chunk

from .registry import ScoreRequest, register_score

_FOREACH_ELEMENTS = 2**24  # elements whose squares are in memory at once: 64 MiB, or one tensor


class AccumulatedFisher:
    """Exponential moving average of squared descent gradients: Adam's second moment (arXiv 1412.6980).

    Σₖ (1 − decay) · decayᵏ · g² over the gradients g of the last steps. Where a sum over samples of squared gradients
    is the diagonal of the empirical Fisher matrix, this squares the mean gradient of a batch, at weights that have
    changed since. Adam's bias correction, a division by 1 − decayᵗ, is left out: it would change no order. Under DDP
    all processes hold the same; where weights are sharded, each holds that of its shards.

    Args:
        sharding: where the weights live.
        parameters: what to score.
        decay: share of the old value in the new one, in [0, 1).

    Attributes:
        scores: float32, shaped like the local shards; zero before the first step.

    Raises:
        ValueError: the decay is out of its range.
    """

    def __init__(self, sharding: ShardedWeights, parameters: Sequence[nn.Parameter], decay: float = 0.99) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay is {decay}; a number in [0, 1) is needed")
        self._sharding, self._parameters, self._decay = sharding, list(parameters), decay
        self.scores = [
            torch.zeros_like(shard.weight, dtype=torch.float32) for shard in sharding.shards(self._parameters)
        ]

    @torch.no_grad()
    def update(self, gradients: Sequence[Tensor], inverse_scale: Tensor | float = 1.0) -> None:
        """Average in the gradients of one step. Collective where weights are sharded; never waits for the device.

        Where any of them, on any process of the shard group, is not finite, everything stays what it was.

        Args:
            gradients: of the parameters, shaped like their local shards, of any floating dtype, already reduced; not
                written to. `ShardedWeights.gradients` returns them.
            inverse_scale: 1 / what the loss was scaled by; float32 of shape (), or a number.
        """
        if not self.scores:
            return
        # The squares overflow before the gradients do.
        largest = [g for g in gradients if g.numel()]
        norms = list(torch._foreach_norm(largest, math.inf, dtype=torch.float32)) if largest else []
        worst = torch.stack(norms).amax() if norms else self.scores[0].new_zeros(())
        bad = (~(worst * inverse_scale).square().isfinite()).float()
        good = self._sharding.shard_group.all_reduce(bad) == 0.0
        share = (1.0 - self._decay) * good
        for some in self._chunks():
            squares = list(torch._foreach_mul([gradients[i].float() for i in some], inverse_scale))
            torch._foreach_mul_(squares, squares)
            # Zeros, if anything is not finite: which no product with a float makes of what is not a number.
            torch._foreach_mul_([s.view(torch.int32) for s in squares], good.to(torch.int32))
            torch._foreach_mul_(squares, share)
            scores = [self.scores[i] for i in some]
            torch._foreach_mul_(scores, 1.0 - share)
            torch._foreach_add_(scores, squares)

    def _chunks(self) -> Iterator[list[int]]:
        """Indices of the scores that one call of a foreach function updates, so that its temporaries stay small."""
        some: list[int] = []
        size = 0
        for index, score in enumerate(self.scores):
            if some and size + score.numel() > _FOREACH_ELEMENTS:
                yield some
                some, size = [], 0
            some.append(index)
            size += score.numel()
        yield some

    def state_dict(self) -> dict[str, list[Tensor | Chunk]]:
        """`scores`: copies of them, by parameter."""
        pairs = zip(self._parameters, self.scores, strict=True)
        return {"scores": [self._sharding.chunk(p, score.clone()) for p, score in pairs]}

    def load_state_dict(self, state_dict: Mapping[str, Sequence[Tensor]]) -> None:
        """Take back what `state_dict` returned, under any backend and number of processes.

        Raises:
            ValueError: it is of other parameters; nothing was loaded then.
        """
        full = state_dict["scores"]
        theirs = [tuple(saved.shape) for saved in full]
        mine = [tuple(self._sharding.full_shape(p)) for p in self._parameters]
        if theirs != mine:
            other = next((i for i, (a, b) in enumerate(zip(theirs, mine, strict=False)) if a != b), None)
            what = f"{len(theirs)} tensors" if other is None else f"shape {theirs[other]} at {other}"
            has = f"{len(mine)}" if other is None else f"{mine[other]}"
            raise ValueError(f"the saved accumulated scores have {what}, these have {has}")
        for p, score, saved in zip(self._parameters, self.scores, full, strict=True):
            score.copy_(self._sharding.scatter(p, saved.to(score.device)))


@register_score("accumulated", "moving average of squared descent gradients (Adam's second moment)", "arXiv 1412.6980")
def accumulated(request: ScoreRequest) -> list[Tensor]:
    """The score of the same name."""
    return [request.accumulated[name] for name in request.parameters]

"""Gradients of descents that accumulate while other micro-batches climb in between."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ssam_scale.sharding import Sharding


class Accumulating:
    """Keeps the descents' gradients of a step whose micro-batches each climb and descend by themselves.

    An ascent's gradient is computed where those of the descents before it are. On one process and under DDP, where they
    wait in `.grad` unreduced, they are taken from there and put back: the last descent reduces all of them. Where each
    micro-batch's are reduced (FSDP2, ZeRO) their sum is kept as the weights are sharded, and added at the end.

    Args:
        sharding: where the weights live.
        parameters: all that are trained.
    """

    def __init__(self, sharding: Sharding, parameters: Iterable[nn.Parameter]) -> None:
        self._sharding, self._parameters = sharding, list(parameters)
        self._aside: list[Tensor | None] = []
        self._sum: list[Tensor] = []
        self._begun = False

    @torch.no_grad()
    def set_aside(self, optimizer: torch.optim.Optimizer) -> None:
        """Before an ascent: no gradient is where its own will be."""
        if self._sharding.accumulates_in_grad:
            self._aside = [p.grad for p in self._parameters]
            for p in self._parameters:
                p.grad = None
            return
        if self._begun:
            self._take_sum()
            self._sharding.clear_gradients(optimizer)
        self._begun = True

    def put_back(self) -> None:
        """Before a descent, after the gradients of its ascent were dropped: it adds to those of the descents before."""
        for p, gradient in zip(self._parameters, self._aside, strict=bool(self._aside)):
            p.grad = gradient

    @torch.no_grad()
    def add(self) -> None:
        """After the last descent: the gradients are those of all.

        Raises:
            ValueError: the backend shows copies of its gradients, to which nothing can be added.
        """
        if not self._sum:
            return
        gradients = self._sharding.gradients(self._parameters)
        again = self._sharding.gradients(self._parameters)
        if any(a.data_ptr() != b.data_ptr() for a, b in zip(gradients, again, strict=True) if a.numel()):
            raise ValueError(
                "direction scope 'micro_batch' needs float32 gradients with ZeRO stage 3, which copies others"
            )
        torch._foreach_add_(gradients, self._sum)
        self._sum = []

    def _take_sum(self) -> None:
        gradients = self._sharding.gradients(self._parameters)
        if self._sum:
            torch._foreach_add_(self._sum, gradients)
        else:
            self._sum = [g.clone() for g in gradients]

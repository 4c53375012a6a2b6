"""Gradients of descents that accumulate while other micro-batches climb in between."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ssam_scale.sharding import Sharding

from .live_gradients import live_gradients


class Accumulating:
    """Keeps the descents' gradients of a step whose micro-batches each climb and descend by themselves.

    An ascent's gradient is computed where those of the descents before it are. On one process and under DDP, where they
    wait in `.grad` unreduced, they are taken from there and put back: the last descent reduces all of them. Where each
    micro-batch's are reduced (FSDP2, ZeRO) their sum is kept as the weights are sharded, and added at the end.

    Args:
        sharding: where the weights live.
        parameters: all that are trained, by name.
    """

    def __init__(self, sharding: Sharding, parameters: Mapping[str, nn.Parameter]) -> None:
        self._sharding, self._parameters = sharding, parameters
        self._reached: set[int] = set()
        self._aside: list[Tensor | None] = []
        self._sum: list[Tensor] = []
        self._begun = False

    @torch.no_grad()
    def set_aside(self, optimizer: torch.optim.Optimizer) -> None:
        """Before an ascent: no gradient is where its own will be."""
        if self._sharding.accumulates_in_grad:
            self._aside = [p.grad for p in self._parameters.values()]
            for p in self._parameters.values():
                p.grad = None
            return
        if self._begun:
            self._take_sum()
            self._sharding.clear_gradients(optimizer)
        self._begun = True

    def put_back(self) -> None:
        """Before a descent, after the gradients of its ascent were dropped: it adds to those of the descents before."""
        for p, gradient in zip(self._parameters.values(), self._aside, strict=bool(self._aside)):
            p.grad = gradient

    @torch.no_grad()
    def add(self) -> None:
        """After the last descent: the gradients are those of all.

        Raises:
            ValueError: the backend shows copies of its gradients, to which nothing can be added.
        """
        if not self._sum:
            return
        if self._sharding.leaves_grad:
            for p in self._parameters.values():
                if p.grad is None and id(p) in self._reached:  # by the batches before this one
                    p.grad = torch.zeros_like(p)
        names, gradients = live_gradients(
            self._sharding, self._parameters, self._parameters, "direction scope 'micro_batch'"
        )
        sums = dict(zip(self._parameters, self._sum, strict=True))
        torch._foreach_add_(gradients, [sums[name] for name in names])
        self._sum = []

    def _take_sum(self) -> None:
        every = list(self._parameters.values())
        self._reached |= {id(p) for p in every if p.grad is not None}
        gradients = self._sharding.gradients(every)
        if self._sum:
            torch._foreach_add_(self._sum, gradients)
        else:
            self._sum = [g.clone() for g in gradients]

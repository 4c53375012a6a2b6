"""Exponential moving average of the weights (EMA)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ssam_scale.sharding import ShardedWeights


class AveragedWeights:
    """The average of a network's weights and floating-point buffers, kept where and how they are sharded.

    Args:
        network: whose weights are averaged; constructed once it is distributed.
        decay: share of the old average kept at each update.
        sharding: how it is distributed.
    """

    def __init__(self, network: nn.Module, decay: float, sharding: ShardedWeights) -> None:
        self._decay = decay
        self._sharding = sharding
        self._parameters = dict(network.named_parameters())
        self._buffers = {name: b for name, b in network.named_buffers() if b.is_floating_point()}
        self._averaged = [t.detach().clone() for t in self._live()]

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the weights as they are."""
        torch._foreach_lerp_(self._averaged, self._live(), 1.0 - self._decay)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The network computes with the average inside, and with its own weights again afterwards."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def whole(self) -> dict[str, Tensor]:
        """The averages by name, whole. Collective."""
        averaged = dict(zip([*self._parameters, *self._buffers], self._averaged, strict=True))
        return {
            name: self._sharding.gather(self._parameters[name], mine) if name in self._parameters else mine
            for name, mine in averaged.items()
        }

    @torch.no_grad()
    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Take back what `whole` returned, on any number of processes."""
        for name, mine in zip([*self._parameters, *self._buffers], self._averaged, strict=True):
            whole = saved[name].to(mine.device)
            mine.copy_(self._sharding.scatter(self._parameters[name], whole) if name in self._parameters else whole)

    def _live(self) -> list[Tensor]:
        shards = self._sharding.shards(list(self._parameters.values()))
        return [*(shard.weight for shard in shards), *self._buffers.values()]

    @torch.no_grad()
    def _exchange(self) -> None:
        live = self._live()
        held = [t.clone() for t in live]
        torch._foreach_copy_(live, self._averaged)
        torch._foreach_copy_(self._averaged, held)
        self._sharding.publish()

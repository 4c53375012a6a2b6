"""Exponential moving average of the weights (EMA)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def _local(tensors: list[Tensor]) -> list[Tensor]:
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]


class AveragedWeights:
    """The average of a network's weights and floating-point buffers, kept where and how they are sharded.

    Args:
        network: whose weights are averaged; constructed once it is distributed.
        decay: share of the old average kept at each update.
        publish: makes the network's next forward use weights that were exchanged.
    """

    def __init__(self, network: nn.Module, decay: float, publish: Callable[[], None]) -> None:
        self._decay = decay
        self._publish = publish
        live = {name: p.detach() for name, p in network.named_parameters()}
        live |= {name: b for name, b in network.named_buffers() if b.is_floating_point()}
        self._live = _local(list(live.values()))
        self.tensors: dict[str, Tensor] = {name: t.clone() for name, t in live.items()}
        self._averaged = _local(list(self.tensors.values()))

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the weights as they are."""
        torch._foreach_lerp_(self._averaged, self._live, 1.0 - self._decay)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The network computes with the average inside, and with its own weights again afterwards."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        held = [t.clone() for t in self._live]
        torch._foreach_copy_(self._live, self._averaged)
        torch._foreach_copy_(self._averaged, held)
        self._publish()

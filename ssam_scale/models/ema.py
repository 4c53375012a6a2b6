"""Exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ssam_scale.sharding import ShardedWeights
from ssam_scale.sharding.chunks import Chunk, SavedTensor, gathered, own_part, whole


class EMA:
    """Exponential moving average of a network's weights and floating-point buffers, sharded as the weights are.

    Args:
        network: whose weights are averaged; it has been distributed already.
        decay: share of the old average that is kept at each update.
        sharding: how the network is distributed.
        warmup: let the decay rise from 0 to `decay`, so that the first weights are forgotten however short a run is.
    """

    def __init__(self, network: nn.Module, decay: float, sharding: ShardedWeights, *, warmup: bool = False) -> None:
        self._decay, self._warmup = decay, warmup
        self._sharding = sharding
        self._parameters = dict(network.named_parameters())
        self._buffers = {name: b for name, b in network.named_buffers() if b.is_floating_point()}
        self._averaged = [t.detach().clone() for t in self._live()]

    @torch.no_grad()
    def update(self, step: int | None = None) -> None:
        """Move the average towards the weights as they are after `step` steps; None: by `decay`, without warm-up."""
        torch._foreach_lerp_(self._averaged, self._live(), 1.0 - self.get_decay(step))

    def get_decay(self, step: int | None = None) -> float:
        """The decay of the update after `step` steps; with warm-up that of timm's `ModelEmaV3` with `use_warmup`.

        That is 1 - n^(-2/3) after n steps, an average over the last n^(2/3) steps or so, until `decay` is reached.
        """
        if step is None or not self._warmup:
            return self._decay
        return min(self._decay, 1.0 - float(max(step, 1)) ** (-2 / 3))

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The network computes with the average inside, and with its own weights again afterwards."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by name, in full tensors. Collective."""
        return dict(gathered(self.sharded_state_dict()))

    def sharded_state_dict(self) -> dict[str, Tensor | Chunk]:
        """What `state_dict` returns, before it is gathered. Not collective."""
        return {
            name: self._sharding.chunk(self._parameters[name], mine) if name in self._parameters else mine
            for name, mine in self._by_name().items()
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Tensor | SavedTensor]) -> None:
        """Take back what `state_dict` returned, under any backend and number of processes."""
        for name, mine in self._by_name().items():
            p, saved = self._parameters.get(name), state_dict[name]
            mine.copy_(whole(saved) if p is None else own_part(self._sharding, p, saved))

    @property
    def buffers(self) -> dict[str, Tensor]:
        """The averages of floating-point buffers by name, which this process has its own of."""
        return {name: mine for name, mine in self._by_name().items() if name in self._buffers}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the averages in full, by name."""
        full = self._sharding.full_shape
        return {
            name: tuple(full(self._parameters[name]) if name in self._parameters else mine.shape)
            for name, mine in self._by_name().items()
        }

    def _by_name(self) -> dict[str, Tensor]:
        """The local parts of the averages."""
        return dict(zip([*self._parameters, *self._buffers], self._averaged, strict=True))

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
        torch.clear_autocast_cache()  # an autocast around this may remember low-precision copies of the others

"""What a checkpoint holds of tensors that are sharded: each rank's run of them, or all of them gathered."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .interface import ShardedWeights


@dataclass(frozen=True)
class Chunk:
    """This rank's run of a tensor that is sharded over ranks, in row-major order.

    Attributes:
        local: its elements, of any shape; empty where this rank has none.
        start: the place of the first of them in the full tensor.
        shape: of the full tensor.
        primary: whether this rank saves it: of several copies of a shard (HSDP) one is saved.
        gather: the full tensor. Collective.
    """

    local: Tensor
    start: int
    shape: torch.Size
    primary: bool
    gather: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        """Of the full tensor."""
        return self.shape.numel() * self.local.element_size()


class SavedTensor(Protocol):
    """A full tensor in the files of a checkpoint, of which nothing has been read yet.

    Attributes:
        shape: of the full tensor.
        dtype: of its elements.
    """

    shape: torch.Size
    dtype: torch.dtype

    def run(self, start: int, count: int) -> Tensor:
        """So many elements from a place on, in row-major order: of shape (count,), on the CPU."""

    def whole(self) -> Tensor:
        """All of it, on the CPU."""


def own_part(sharding: ShardedWeights, parameter: nn.Parameter, saved: Tensor | SavedTensor) -> Tensor:
    """This rank's shard of a saved tensor that is shaped like `parameter`. Not collective."""
    if isinstance(saved, Tensor):
        return sharding.scatter(parameter, saved)
    [shard] = sharding.shards([parameter])
    return saved.run(shard.start, shard.weight.numel()).view(shard.weight.shape)


def gathered(state: Any) -> Any:
    """A state with full tensors in the place of its chunks. Collective."""
    return _mapped(state, lambda leaf: leaf.gather() if isinstance(leaf, Chunk) else leaf)


def whole(saved: Any) -> Any:
    """A saved state with all of its tensors read."""
    return _mapped(saved, lambda leaf: leaf.whole() if hasattr(leaf, "whole") else leaf)


def _mapped(state: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(state, Mapping):
        return {key: _mapped(value, change) for key, value in state.items()}
    if isinstance(state, (list, tuple)) and not isinstance(state, torch.Size):
        return type(state)(_mapped(value, change) for value in state)
    return change(state)

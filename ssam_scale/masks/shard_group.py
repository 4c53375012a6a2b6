"""What masks know of other processes: the group that one copy of the weights is sharded over, and sums over it."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class ShardGroup(Protocol):
    """The ranks that one copy of the weights is sharded over; a `sharding.ProcessGroup` is one.

    Attributes:
        size: number of ranks; 1 where every process holds all weights.
        rank: of this process in the group.
    """

    size: int
    rank: int

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """`tensor` summed over the ranks, in place. Collective."""

"""What other processes need to be told: parts of gradients in an ascent, of weights when they are perturbed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn


class Elements(Protocol):
    """Some elements of a tensor, in row-major order.

    Attributes:
        count: how many.
        numel: elements of the tensor.
    """

    count: int
    numel: int

    def take(self, source: Tensor) -> Tensor:
        """The elements of `source`, of shape (count,)."""

    def put(self, target: Tensor, values: Tensor) -> None:
        """Write `values`, of shape (count,), to the elements of `target`."""

    def booleans(self) -> Tensor:
        """True for the elements: shape (numel,)."""


@dataclass(frozen=True)
class Needed:
    """What is needed of an ascent pass. Lists are the same on every process.

    Attributes:
        parameters: whose gradients.
        parts: which elements of each one's local gradient; None: all of them.
        whole: which elements of each one's whole gradient those of all processes are.
        kept: parameters that are not perturbed: sharded units of none but these (and frozen ones) stay gathered from
            the ascent until `Sharding.forget_copies` is called. Empty: nothing stays.
        within_shard_group: where there are several copies of sharded weights, whether gradients are averaged over the
            processes of each copy by itself.
    """

    parameters: Sequence[nn.Parameter]
    parts: Sequence[Elements | None]
    whole: Sequence[Elements | None]
    kept: Sequence[nn.Parameter] = ()
    within_shard_group: bool = False


@dataclass(frozen=True)
class Written:
    """What was written to. Lists are the same on every process.

    Attributes:
        parameters: those that were written to on any process.
        local: which elements of each one's shard; None: all of them.
        whole: which elements of what is `Sharding.exposed` of each.
    """

    parameters: Sequence[nn.Parameter]
    local: Sequence[Elements | None]
    whole: Sequence[Elements | None]

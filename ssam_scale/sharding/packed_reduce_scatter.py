"""Reduce-scatter of the masked elements only, of gradients whose shards are padded to the same length (FSDP2, ZeRO 3).

Both scatter a buffer of the padded shards of all gradients for rank 0, then those for rank 1, and so on. What of it is
sent is decided once for a mask: packing is then one masked select for each buffer, however many parameters and ranks
there are, and takes one bit for each of its elements.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor, nn

from .interface import AscentReduction, Elements

# Of FSDP2 there is one for each parameter group, of ZeRO 3 one for each content of its bucket.
_MAX_REMEMBERED = 1024


@dataclass(frozen=True, eq=False)
class ScatteredGradient:
    """One gradient in the buffer.

    Attributes:
        numel: elements of the full gradient.
        padded: elements of each rank's shard, with padding at the end of the full gradient.
        asked: whether any of it is needed.
        full: which elements of the full gradient are; None: all of them.
    """

    numel: int
    padded: int
    asked: bool
    full: Elements | None

    @property
    def whole(self) -> bool:
        """Whether all of it is needed."""
        return self.asked and self.full is None

    def same_as(self, other: ScatteredGradient) -> bool:
        """Whether the same elements of the same gradient are needed."""
        return self.full is other.full and (self.numel, self.padded, self.asked) == (
            other.numel,
            other.padded,
            other.asked,
        )


class Asked:
    """What of each parameter's gradient a reduction asks for.

    Args:
        reduction: the ascent's.
    """

    def __init__(self, reduction: AscentReduction) -> None:
        self._full = {id(p): full for p, full in zip(reduction.parameters, reduction.full, strict=True)}

    def of(self, parameter: nn.Parameter, numel: int, padded: int) -> ScatteredGradient:
        """A parameter's gradient, of which the buffer has `padded` of `numel` elements for each rank."""
        return ScatteredGradient(numel, padded, id(parameter) in self._full, self._full.get(id(parameter)))


class Packing(Protocol):
    """What of the buffer is sent.

    Attributes:
        numel: elements of the buffer for one rank.
        width: elements that are sent to each rank.
        bits: that are remembered for it, one an element.
    """

    numel: int
    width: int
    bits: int

    def pack(self, buffer: Tensor) -> Tensor:
        """What is sent, of shape (ranks · width,), of the buffer of shape (ranks · numel,)."""

    def unpack(self, received: Tensor, output: Tensor) -> None:
        """Write `received`, of shape (width,), to its places among this rank's shards, of shape (numel,)."""


class _Columns:
    """Whole gradients: ranges of each rank's shards."""

    bits = 0

    def __init__(self, gradients: Sequence[ScatteredGradient], size: int) -> None:
        self._size = size
        self.numel = sum(g.padded for g in gradients)
        self._ranges: list[tuple[int, int]] = []
        for g, end in zip(gradients, accumulate(g.padded for g in gradients), strict=True):
            if not g.asked:
                continue
            start = end - g.padded
            if self._ranges and self._ranges[-1][1] == start:
                start = self._ranges.pop()[0]
            self._ranges.append((start, end))
        self.width = sum(end - start for start, end in self._ranges)

    def pack(self, buffer: Tensor) -> Tensor:
        by_rank = buffer.view(self._size, -1)
        return torch.cat([by_rank[:, start:end] for start, end in self._ranges], dim=1).view(-1)

    def unpack(self, received: Tensor, output: Tensor) -> None:
        sources = received.split([end - start for start, end in self._ranges])
        torch._foreach_copy_([output[start:end] for start, end in self._ranges], list(sources))


class _Bits:
    """Any elements. Ranks that need fewer than another are sent some more, so that all are sent as many."""

    def __init__(self, gradients: Sequence[ScatteredGradient], size: int, rank: int) -> None:
        self.numel = sum(g.padded for g in gradients)
        some = next(g.full for g in gradients if g.full is not None)
        flags = torch.cat([_flags(g, some.device, size) for g in gradients], dim=1)
        counts = flags.sum(1)
        most = counts.max()
        free = ~flags
        flags |= free & (free.cumsum(1, dtype=torch.int32) <= (most - counts)[:, None])
        self._every, self._own = some.of_booleans(flags.view(-1)), some.of_booleans(flags[rank])
        self.width, self.bits = self._own.count, self._every.numel + self._own.numel

    def pack(self, buffer: Tensor) -> Tensor:
        return self._every.take(buffer)

    def unpack(self, received: Tensor, output: Tensor) -> None:
        self._own.put(output, received)


def _flags(g: ScatteredGradient, device: torch.device, size: int) -> Tensor:
    """What is needed of a gradient: bool [ranks, padded]."""
    flags = torch.zeros(size * g.padded, dtype=torch.bool, device=device)
    if g.full is not None:
        flags[: g.numel] = g.full.booleans()
    elif g.asked:
        flags[: g.numel] = True
    return flags.view(size, g.padded)


class Packings:
    """The packings of a mask, which are made when they are asked for first. Making one waits for the device.

    Args:
        size: number of ranks.
        rank: of this process among them.
    """

    def __init__(self, size: int, rank: int) -> None:
        self._size, self._rank = size, rank
        self._known: OrderedDict[Hashable, tuple[Sequence[ScatteredGradient], Packing]] = OrderedDict()

    @property
    def bits(self) -> int:
        """What is remembered of masks."""
        return sum(packing.bits for _, packing in self._known.values())

    def __call__(self, buffer: Hashable, gradients: Sequence[ScatteredGradient]) -> Packing | None:
        """What is sent of a buffer; None: all of it.

        Args:
            buffer: names it: of the last mask that it was asked about its packing is remembered.
            gradients: in it, in order.
        """
        if all(g.whole for g in gradients):
            return None
        before, packing = self._known.pop(buffer, ((), None))
        if packing is None or not _same(before, gradients):
            bits = any(g.full is not None for g in gradients)
            packing = _Bits(gradients, self._size, self._rank) if bits else _Columns(gradients, self._size)
        self._known[buffer] = gradients, packing
        if len(self._known) > _MAX_REMEMBERED:
            self._known.popitem(last=False)
        return packing


def _same(some: Sequence[ScatteredGradient], others: Sequence[ScatteredGradient]) -> bool:
    return len(some) == len(others) and all(a.same_as(b) for a, b in zip(some, others, strict=True))

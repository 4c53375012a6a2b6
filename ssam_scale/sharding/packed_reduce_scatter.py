"""Reduce-scatter of the masked elements only, of gradients whose shards are padded to the same length (FSDP2, ZeRO 3).

Both scatter a buffer of the padded shards of all gradients for rank 0, then those for rank 1, and so on. What of it is
sent is decided once for a mask: packing is then one masked select for each buffer, however many parameters and ranks
there are, and takes one bit for each of its elements.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .interface import AscentReduction, Elements

# Of what is needed, by which what is sent may be more for the sake of one collective instead of two.
_SLACK = 1.01
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


@dataclass(frozen=True)
class Shares:
    """How the elements that are sent are shared out among the ranks that sum them up.

    Attributes:
        width: elements that each rank sums up: a reduce-scatter knows no other way.
        counts: elements that each rank is to have in the end, in the order of ranks.
        moved: whether ranks pass on what others are to have. Otherwise each sums up what it is to have.
    """

    width: int
    counts: tuple[int, ...]
    moved: bool

    @classmethod
    def of(cls, counts: Sequence[int], capacity: int) -> Shares:
        """Shares for ranks that need `counts`, each of at most `capacity` elements; some get more than they need.

        Where they need about as many, each sums up as many as the one that needs most. Else all the elements are cut
        into equal parts, and what a rank has summed up for others it passes on, which is sent once and not by each.
        """
        size, total, most = len(counts), sum(counts), max(counts)
        if size * most <= _SLACK * total:
            return cls(most, (most,) * size, moved=False)
        width, more = -(-total // size), list(counts)
        left = size * width - total
        for rank in sorted(range(size), key=lambda rank: counts[rank]):
            extra = min(capacity - counts[rank], left)
            more[rank] += extra
            left -= extra
        return cls(width, tuple(more), moved=True)

    def between(self, summing: int, having: int) -> int:
        """Elements that rank `summing` sums up and rank `having` is to have."""
        start = sum(self.counts[:having])
        end = start + self.counts[having]
        return max(0, min((summing + 1) * self.width, end) - max(summing * self.width, start))

    @property
    def passed_on(self) -> float:
        """Elements that a rank passes on, the mean over ranks."""
        if not self.moved:
            return 0.0
        ends = list(accumulate(self.counts))
        kept = 0
        for rank, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
            kept += max(0, min((rank + 1) * self.width, end) - max(rank * self.width, start))
        return self.width - kept / len(self.counts)


class Packing(Protocol):
    """What of the buffer is sent.

    Attributes:
        numel: elements of the buffer for one rank.
        bits: that are remembered for it, one an element.
    """

    numel: int
    bits: int

    def reduce_scatter(self, output: Tensor, buffer: Tensor, reduce: Reduce, group: dist.ProcessGroup | None) -> None:
        """What is sent of `buffer`, reduced, to its places in `output`; the rest of that stays as it is. Collective.

        Args:
            output: of shape (numel,).
            buffer: of shape (ranks · numel,).
            reduce: the reduce-scatter of what is sent.
            group: the ranks.
        """


Reduce: TypeAlias = Callable[[Tensor, Tensor], object]
"""Given the tensor of shape (n,) that the sums go to, and what is summed up, of shape (ranks · n,)."""


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

    def reduce_scatter(self, output: Tensor, buffer: Tensor, reduce: Reduce, group: dist.ProcessGroup | None) -> None:
        """See `Packing`."""
        lengths = [end - start for start, end in self._ranges]
        if not lengths:
            return
        by_rank = buffer.view(self._size, -1)
        received = buffer.new_empty(sum(lengths))
        reduce(received, torch.cat([by_rank[:, start:end] for start, end in self._ranges], dim=1).view(-1))
        torch._foreach_copy_([output[start:end] for start, end in self._ranges], list(received.split(lengths)))


class _Bits:
    """Any elements."""

    def __init__(self, gradients: Sequence[ScatteredGradient], size: int, rank: int) -> None:
        self.numel = sum(g.padded for g in gradients)
        some = next(g.full for g in gradients if g.full is not None)
        flags = torch.cat([_flags(g, some.device, size) for g in gradients], dim=1)
        counts = flags.sum(1)
        self._shares = shares = Shares.of(counts.tolist(), self.numel)
        more = torch.tensor(shares.counts, device=some.device) - counts
        free = ~flags
        flags |= free & (free.cumsum(1, dtype=torch.int32) <= more[:, None])
        self._every, self._own = some.of_booleans(flags.view(-1)), some.of_booleans(flags[rank])
        self.bits = self._every.numel + self._own.numel
        self._passed = [shares.between(rank, other) for other in range(size)]
        self._received = [shares.between(other, rank) for other in range(size)]

    def reduce_scatter(self, output: Tensor, buffer: Tensor, reduce: Reduce, group: dist.ProcessGroup | None) -> None:
        """See `Packing`."""
        if not self._shares.width:
            return
        summed = buffer.new_empty(self._shares.width)
        reduce(summed, self._every.take(buffer))
        if self._shares.moved:
            own = buffer.new_empty(self._own.count)
            dist.all_to_all_single(own, summed, self._received, self._passed, group=group)
            summed = own
        self._own.put(output, summed)


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

"""A subset of a shard's elements, as a packed bit mask or as kept rows, without a byte a weight for the mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .flat import LIMIT, powers_of_two
from .kernels import move
from .kernels.move import Spans, spans_of_bits, spans_of_rows
from .masked import masked_scatter_, masked_select


class Subset(Protocol):
    """Some elements of a tensor, in row-major order whatever its strides.

    Attributes:
        count: how many they are.
        numel: elements of the tensor.
        device: where the tensor is.
        spans: where they lie, for compiled loops; None where these do not work, as on other devices than the CPU.
        tables: what kernels of a GPU have made of lists of subsets that begin with this one.
    """

    count: int
    numel: int
    device: torch.device
    spans: Spans | None
    tables: dict[Any, Any]

    @property
    def bits(self) -> Tensor:
        """Where they lie, for what does without compiled loops: as `BitMask.packed`."""

    def counts(self, size: int) -> list[int]:
        """How many lie among the first `size` elements of the tensor, how many among the next, and so on.

        Of the sizes that are asked for in a step, a device has to be waited for once in the life of the subset.

        Args:
            size: a multiple of 8, or at least the number of elements.
        """

    def take(self, source: Tensor) -> Tensor:
        """A copy of the elements of `source`, of shape (count,)."""

    def put(self, target: Tensor, values: Tensor) -> None:
        """Write `values`, of shape (count,), to the elements of `target`."""

    def booleans(self) -> Tensor:
        """The boolean mask: True for the elements, of shape (numel,)."""

    @staticmethod
    def masked_select(tensors: Sequence[Tensor], subsets: Sequence[Any]) -> list[Tensor]:
        """The function of this name, for those who know subsets by what they do (`sharding`)."""

    @staticmethod
    def masked_scatter_(tensors: Sequence[Tensor], subsets: Sequence[Any], values: Sequence[Tensor]) -> None:
        """The function of this name."""

    def of_booleans(self, booleans: Tensor) -> Subset:
        """Of another tensor, the elements for which `booleans`, of shape (its elements,), are True."""


class _Subset:
    """What both kinds of subset have in common."""

    count: int
    spans: Spans | None

    @staticmethod
    def masked_select(tensors: Sequence[Tensor], subsets: Sequence[Any]) -> list[Tensor]:
        """See `Subset`."""
        return masked_select(tensors, subsets)

    @staticmethod
    def masked_scatter_(tensors: Sequence[Tensor], subsets: Sequence[Any], values: Sequence[Tensor]) -> None:
        """See `Subset`."""
        masked_scatter_(tensors, subsets, values)

    def take(self: Subset, source: Tensor) -> Tensor:
        """See `Subset`."""
        [values] = masked_select([source], [self])
        return values

    def put(self: Subset, target: Tensor, values: Tensor) -> None:
        """See `Subset`."""
        masked_scatter_([target], [self], [values])

    def of_booleans(self, booleans: Tensor) -> Subset:
        """See `Subset`."""
        return BitMask(pack(booleans), booleans.numel())


class BitMask(_Subset):
    """Any elements, as a bit mask: one bit for each element of the tensor.

    Args:
        packed: uint8 of shape (ceil(numel / 8),): bit j of byte i stands for element 8 · i + j; unused bits are 0.
        numel: elements of the tensor.
    """

    def __init__(self, packed: Tensor, numel: int) -> None:
        self.packed, self.numel, self.device = packed, numel, packed.device
        self.tables: dict[Any, Any] = {}
        self._counts: dict[int, list[int]] = {}
        if move.streams(packed):
            self.spans = spans_of_bits(packed, numel)
            self.count = self.spans.count
            if self.spans.bits is not None:
                self.packed = self.spans.bits[: len(packed)]  # and not twice
        else:
            self.spans = None
            self.count = sum(self._counted(LIMIT))  # so that no step has to wait for the device

    @property
    def bits(self) -> Tensor:
        """See `Subset`."""
        return self.packed

    def counts(self, size: int) -> list[int]:
        """See `Subset`."""
        return [self.count] if size >= self.numel else self._counted(size)

    def _counted(self, size: int) -> list[int]:
        if size not in self._counts:
            self._counts[size] = [popcount(part) for part in self.packed.split(size // 8)]
        return self._counts[size]

    def booleans(self) -> Tensor:
        """See `Subset`."""
        return unpack(self.packed)[: self.numel]


class Rows(_Subset):
    """Whole rows of a parameter (slices along its first dimension): one flag for each row.

    On devices where loops are not compiled also a bit for each element of the tensor.

    Args:
        keep: booleans on the CPU, one for each row of the whole parameter.
        size: elements of a row.
        start: row-major position in the whole parameter of the tensor's first element.
        numel: elements of the tensor, which may begin and end within a row.
        device: where the tensor is.

    Attributes:
        kept: indices of the rows of the whole parameter, on `device`.
        kept_share: how many of them, in [0, 1].
    """

    def __init__(self, keep: Tensor, size: int, start: int, numel: int, device: torch.device) -> None:
        self.keep, self.size, self.start, self.numel, self.device = keep, size, start, numel, device
        kept = keep.nonzero().view(-1)
        self.kept = kept.to(device)
        self.kept_share = len(kept) / max(len(keep), 1)
        self.tables: dict[Any, Any] = {}
        self._counts: dict[int, list[int]] = {}
        self.count = sum(self._counted(max(numel, 1)))
        self.spans = spans_of_rows(kept, size, start, numel) if move.streams(self.kept) else None
        self._bits = pack(self.booleans()) if self.spans is None else None

    @property
    def bits(self) -> Tensor:
        """See `Subset`."""
        return pack(self.booleans()) if self._bits is None else self._bits

    def counts(self, size: int) -> list[int]:
        """See `Subset`."""
        if size not in self._counts:
            self._counts[size] = [self.count] if size >= self.numel else self._counted(size)
        return self._counts[size]

    def _counted(self, size: int) -> list[int]:
        edges = torch.arange(0, self.numel + size, size).clamp_(max=self.numel) + self.start
        rows, within = edges // self.size, edges % self.size
        before = torch.cat([torch.zeros(1, dtype=torch.int64), self.keep.cumsum(0)]) * self.size
        partly = torch.cat([self.keep, torch.zeros(1, dtype=torch.bool)])
        found: list[int] = (before[rows] + within * partly[rows]).diff().tolist()
        return found

    def booleans(self) -> Tensor:
        """See `Subset`."""
        first = self.start // self.size
        keep = self.keep[first : -(-(self.start + self.numel) // self.size)].to(self.device)
        begin = self.start - first * self.size
        return keep.repeat_interleave(self.size)[begin : begin + self.numel]


def pack(booleans: Tensor) -> Tensor:
    """`BitMask.packed` of booleans of any shape."""
    flat = booleans.reshape(-1)
    padded = torch.zeros(-(-flat.numel() // 8) * 8, dtype=torch.uint8, device=flat.device)
    padded[: flat.numel()] = flat
    return (padded.view(-1, 8) * powers_of_two(flat.device)).sum(1, dtype=torch.uint8)


def unpack(packed: Tensor) -> Tensor:
    """Booleans of shape (8 · bytes,)."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed[:, None] >> shifts) & 1).view(-1).bool()


def popcount(packed: Tensor) -> int:
    """How many bits are set. Waits for the device."""
    pairs = packed - ((packed >> 1) & 0x55)
    fours = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return int(((fours + (fours >> 4)) & 0x0F).sum(dtype=torch.int64))

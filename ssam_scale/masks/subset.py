"""The perturbed part of a shard, in a bit for each weight or less, and how its weights are moved out and in.

Nothing in here makes a temporary of the size of a shard: the CPU streams through it, other devices go in chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ssam_scale.sharding.interface import Elements

from .kernels.move import Course, Move, add, along_bits, along_rows, compact, put, take

_CHUNK = 1 << 22  # elements that another device than the CPU works on at a time; their indices are the temporary
_ROWS_CHUNK = 1 << 20  # elements of rows that are moved together


class Part(Elements, Protocol):
    """Some elements of a tensor, in row-major order whatever its strides.

    Attributes:
        course: how compiled code comes by them; None on other devices than the CPU, where it does not.
    """

    course: Course | None

    def move_out(self, flat: Tensor, values: Tensor) -> None:
        """Copy the elements of `flat`, in row-major order, to `values`, of shape (count,), perhaps in its own front."""

    def move_in(self, flat: Tensor, values: Tensor) -> None:
        """Copy `values` to the elements of `flat`."""


class _Moved:
    """What parts have in common, whatever they know of where their elements are."""

    count: int
    course: Course | None

    def take(self: Part, source: Tensor) -> Tensor:
        """See `Part`."""
        [values] = taken([source], [self])
        return values

    def put(self: Part, target: Tensor, values: Tensor) -> None:
        """See `Part`."""
        put_([target], [self], [values])


class Bits(_Moved):
    """Any elements: a bit for each.

    Args:
        packed: uint8 of shape (ceil(numel / 8),): bit j of byte i stands for element 8 · i + j; unused bits are 0.
        numel: elements of the tensor.
    """

    def __init__(self, packed: Tensor, numel: int) -> None:
        self.packed = packed
        self.numel = numel
        self.course = along_bits(packed, numel) if _streams(packed) else None
        if self.course is not None:
            self.count = self.course.count
        else:  # asked for once, so that no step has to wait for the device
            self._chunks = [popcount(chunk) for chunk in packed.split(_CHUNK // 8)]
            self.count = sum(self._chunks)

    def move_out(self, flat: Tensor, values: Tensor) -> None:
        """See `Part`."""
        filled = 0
        for start, index in self._indices():
            found = flat[start : start + _CHUNK].index_select(0, index)  # never overlaps what was moved to the front
            values[filled : filled + len(index)] = found
            filled += len(index)

    def move_in(self, flat: Tensor, values: Tensor) -> None:
        """See `Part`."""
        moved = 0
        for start, index in self._indices():
            flat[start : start + _CHUNK].index_copy_(0, index, values[moved : moved + len(index)])
            moved += len(index)

    def _indices(self) -> list[tuple[int, Tensor]]:
        """Of each chunk: where it starts and, from there, the indices of the elements."""
        return [
            (i * _CHUNK, torch.nonzero_static(unpack(packed), size=count).view(-1))
            for i, (packed, count) in enumerate(zip(self.packed.split(_CHUNK // 8), self._chunks, strict=True))
        ]

    def booleans(self) -> Tensor:
        """See `Part`."""
        return unpack(self.packed)[: self.numel]


class Rows(_Moved):
    """Whole rows: a flag for each, and nothing for each weight.

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
        first = -(-start // size)  # the first row that begins in here
        self._head = min(first * size - start, numel)
        rows = (numel - self._head) // size
        self._tail = self._head + rows * size
        self._head_kept = bool(self._head and keep[start // size])
        self._tail_kept = bool(self._tail < numel and keep[first + rows])
        begin, end = torch.searchsorted(kept, torch.tensor([first, first + rows])).tolist()
        self.rows = self.kept[begin:end] - first if first else self.kept[begin:end]  # of the body
        self.count = self._head * self._head_kept + len(self.rows) * size + (numel - self._tail) * self._tail_kept
        self.course = along_rows(kept, size, start, numel) if _streams(self.kept) else None

    def move_out(self, flat: Tensor, values: Tensor) -> None:
        """See `Part`."""
        filled = 0
        if self._head_kept:
            filled = self._head
            values[:filled] = flat[:filled]
        body = self._body(flat)
        for rows in self.rows.split(max(1, _ROWS_CHUNK // self.size)):
            found = body.index_select(0, rows).view(-1)
            values[filled : filled + len(found)] = found
            filled += len(found)
        if self._tail_kept:
            values[filled:] = flat[self._tail :].clone()  # which may overlap

    def move_in(self, flat: Tensor, values: Tensor) -> None:
        """See `Part`."""
        head = self._head * self._head_kept
        tail = head + len(self.rows) * self.size
        if head:
            flat[:head] = values[:head]
        if len(self.rows):
            self._body(flat).index_copy_(0, self.rows, values[head:tail].view(-1, self.size))
        if self._tail_kept:
            flat[self._tail :] = values[tail:]

    def _body(self, flat: Tensor) -> Tensor:
        return flat[self._head : self._tail].view(-1, self.size)

    def booleans(self) -> Tensor:
        """See `Part`."""
        result = torch.zeros(self.numel, dtype=torch.bool, device=self.rows.device)
        self.put(result, torch.ones(self.count, dtype=torch.bool, device=result.device))
        return result


def pack(booleans: Tensor) -> Tensor:
    """`Bits.packed` of booleans of any shape."""
    flat = booleans.reshape(-1)
    padded = torch.zeros(-(-flat.numel() // 8) * 8, dtype=torch.uint8, device=flat.device)
    padded[: flat.numel()] = flat
    powers = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=flat.device)
    return (padded.view(-1, 8) * powers).sum(1, dtype=torch.uint8)


def unpack(packed: Tensor) -> Tensor:
    """Booleans of shape (8 · bytes,)."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed[:, None] >> shifts) & 1).view(-1).bool()


def popcount(packed: Tensor) -> int:
    """How many bits are set. Waits for the device."""
    pairs = packed - ((packed >> 1) & 0x55)
    fours = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return int(((fours + (fours >> 4)) & 0x0F).sum(dtype=torch.int64))


def _streams(tensor: Tensor) -> bool:
    """Whether compiled code works on `tensor`."""
    return tensor.is_cpu


def taken(tensors: Sequence[Tensor], parts: Sequence[Part | None]) -> list[Tensor]:
    """Copies of what `parts` names of `tensors`, of shape (its count,); None stands for everything."""
    values = [t.clone() if p is None else t.new_empty(p.count) for t, p in zip(tensors, parts, strict=True)]
    together, singly = _ways(tensors, parts, values)
    take(together)
    for t, part, row in singly:
        _out(t.reshape(-1), part, row)
    return values


def compacted(tensors: Sequence[Tensor], parts: Sequence[Part | None]) -> list[Tensor]:
    """What `taken` returns, without copies: in the front of the memory of each tensor, where that is row-major."""
    values = [
        t if p is None else t.view(-1)[: p.count] if t.is_contiguous() else t.new_empty(p.count)
        for t, p in zip(tensors, parts, strict=True)
    ]
    together, singly = _ways(tensors, parts, values)
    compact(together)
    for t, part, row in singly:
        _out(t.reshape(-1), part, row)
    return values


def put_(tensors: Sequence[Tensor], parts: Sequence[Part | None], values: Sequence[Tensor]) -> None:
    """Write `values`, as `taken` returned them, to their places."""
    _whole(torch._foreach_copy_, tensors, parts, values)
    together, singly = _ways(tensors, parts, values)
    put(together)
    for t, part, row in singly:
        flat = t.reshape(-1)
        if part.course is not None:
            put([(flat, part.course, row)])
        else:
            part.move_in(flat, row)
        if not t.is_contiguous():  # one in another order (channels last) had to be copied to be flat
            t.copy_(flat.view(t.shape))


def add_(tensors: Sequence[Tensor], parts: Sequence[Part | None], values: Sequence[Tensor]) -> None:
    """Add `values`, as `taken` would return them and at least as precise, to what is in their places; rounds once."""
    _whole(torch._foreach_add_, tensors, parts, values)
    together, singly = _ways(tensors, parts, values, torch.float32)
    add(together)
    for t, part, row in singly:
        part.put(t, part.take(t).add_(row))


def _whole(
    function: Callable[..., Any], tensors: Sequence[Tensor], parts: Sequence[Part | None], values: Sequence[Tensor]
) -> None:
    whole = [(t, value) for t, part, value in zip(tensors, parts, values, strict=True) if part is None]
    if whole:
        function([t for t, _ in whole], [value for _, value in whole])


def _ways(
    tensors: Sequence[Tensor],
    parts: Sequence[Part | None],
    values: Sequence[Tensor],
    dtype: torch.dtype | None = None,
) -> tuple[list[Move], list[tuple[Tensor, Part, Tensor]]]:
    """What compiled code does all at once; and what is done one after the other, so that copies never exist together.

    Args:
        tensors: some.
        parts: of each; those that are everything are left out.
        values: of each.
        dtype: the only one that compiled code knows; None: it knows all.
    """
    together, singly = [], []
    for t, part, row in zip(tensors, parts, values, strict=True):
        if part is None:
            continue
        if part.course is not None and t.is_contiguous() and (dtype is None or t.dtype == row.dtype == dtype):
            together.append((t, part.course, row))
        else:
            singly.append((t, part, row))
    return together, singly


def _out(flat: Tensor, part: Part, values: Tensor) -> None:
    if part.course is not None:
        take([(flat, part.course, values)])
    else:
        part.move_out(flat, values)

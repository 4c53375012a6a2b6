"""A subset of a shard's elements as a packed bit mask or as kept rows; `masked_select` and `masked_scatter_` on it.

What torch's functions of these names do with boolean masks, without a byte a weight for the mask and without index
tensors as large as a shard: compiled loops stream through CPU memory, and other devices work on one chunk at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .kernels.move import Move, Spans, add, compact, put, spans_of_bits, spans_of_rows, take

_CHUNK = 1 << 22  # elements that another device than the CPU works on at a time; their indices are the temporary
_ROWS_CHUNK = 1 << 20  # elements of rows that are moved together


class Subset(Protocol):
    """Some elements of a tensor, in row-major order whatever its strides.

    Attributes:
        count: how many they are.
        numel: elements of the tensor.
        device: where the tensor is.
        spans: where they lie, for compiled loops; None on other devices than the CPU, which do without.
    """

    count: int
    numel: int
    device: torch.device
    spans: Spans | None

    def take(self, source: Tensor) -> Tensor:
        """A copy of the elements of `source`, of shape (count,)."""

    def put(self, target: Tensor, values: Tensor) -> None:
        """Write `values`, of shape (count,), to the elements of `target`."""

    def booleans(self) -> Tensor:
        """The boolean mask: True for the elements, of shape (numel,)."""

    def of_booleans(self, booleans: Tensor) -> Subset:
        """Of another tensor, the elements for which `booleans`, of shape (its elements,), are True."""

    def gather_chunks(self, flat: Tensor, values: Tensor) -> None:
        """Without compiled loops, copy the elements of `flat` to `values`, which may be `flat`'s own first elements."""

    def scatter_chunks(self, flat: Tensor, values: Tensor) -> None:
        """Without compiled loops, copy `values` to the elements of `flat`."""


class _Subset:
    """What both kinds of subset have in common."""

    count: int
    spans: Spans | None

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
        self.spans = spans_of_bits(packed, numel) if _streams(packed) else None
        if self.spans is not None:
            self.count = self.spans.count
        else:  # asked for once, so that no step has to wait for the device
            self._chunks = [popcount(chunk) for chunk in packed.split(_CHUNK // 8)]
            self.count = sum(self._chunks)

    def gather_chunks(self, flat: Tensor, values: Tensor) -> None:
        """See `Subset`."""
        filled = 0
        for start, index in self._indices():
            found = flat[start : start + _CHUNK].index_select(0, index)  # never overlaps what was moved to the front
            values[filled : filled + len(index)] = found
            filled += len(index)

    def scatter_chunks(self, flat: Tensor, values: Tensor) -> None:
        """See `Subset`."""
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
        """See `Subset`."""
        return unpack(self.packed)[: self.numel]


class Rows(_Subset):
    """Whole rows of a parameter (slices along its first dimension): one flag for each row.

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
        self.spans = spans_of_rows(kept, size, start, numel) if _streams(self.kept) else None

    def gather_chunks(self, flat: Tensor, values: Tensor) -> None:
        """See `Subset`."""
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

    def scatter_chunks(self, flat: Tensor, values: Tensor) -> None:
        """See `Subset`."""
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
        """See `Subset`."""
        result = torch.zeros(self.numel, dtype=torch.bool, device=self.rows.device)
        self.put(result, torch.ones(self.count, dtype=torch.bool, device=result.device))
        return result


def pack(booleans: Tensor) -> Tensor:
    """`BitMask.packed` of booleans of any shape."""
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


def masked_select(tensors: Sequence[Tensor], subsets: Sequence[Subset | None]) -> list[Tensor]:
    """Copies of the elements of each tensor that its subset has, of shape (its count,); None is all of the tensor."""
    values = [t.clone() if s is None else t.new_empty(s.count) for t, s in zip(tensors, subsets, strict=True)]
    compiled, chunked = _by_way(tensors, subsets, values)
    take(compiled)
    for t, subset, selected in chunked:
        _gather(t.reshape(-1), subset, selected)
    return values


def compact_(tensors: Sequence[Tensor], subsets: Sequence[Subset | None]) -> list[Tensor]:
    """`masked_select` into the tensors' own memory (stream compaction): a tensor's first elements become the selected.

    What is not row-major is copied instead.
    """
    values = [
        t if s is None else t.view(-1)[: s.count] if t.is_contiguous() else t.new_empty(s.count)
        for t, s in zip(tensors, subsets, strict=True)
    ]
    compiled, chunked = _by_way(tensors, subsets, values)
    compact(compiled)
    for t, subset, selected in chunked:
        _gather(t.reshape(-1), subset, selected)
    return values


def masked_scatter_(tensors: Sequence[Tensor], subsets: Sequence[Subset | None], values: Sequence[Tensor]) -> None:
    """Write `values`, as `masked_select` returns them, to the elements of each tensor that its subset has."""
    _all_elements(torch._foreach_copy_, tensors, subsets, values)
    compiled, chunked = _by_way(tensors, subsets, values)
    put(compiled)
    for t, subset, selected in chunked:
        flat = t.reshape(-1)
        if subset.spans is not None:
            put([(flat, subset.spans, selected)])
        else:
            subset.scatter_chunks(flat, selected)
        if not t.is_contiguous():  # one in another order (channels last) had to be copied to be flat
            t.copy_(flat.view(t.shape))


def masked_add_(tensors: Sequence[Tensor], subsets: Sequence[Subset | None], values: Sequence[Tensor]) -> None:
    """Add `values` to the elements of each tensor that its subset has, in the more precise dtype, rounding once.

    Args:
        tensors: of any floating dtype.
        subsets: of each.
        values: shaped as `masked_select` returns them, at least as precise as the tensors.
    """
    _all_elements(torch._foreach_add_, tensors, subsets, values)
    compiled, chunked = _by_way(tensors, subsets, values, torch.float32)
    add(compiled)
    for t, subset, summand in chunked:
        subset.put(t, subset.take(t).add_(summand))


def _all_elements(
    function: Callable[..., Any],
    tensors: Sequence[Tensor],
    subsets: Sequence[Subset | None],
    values: Sequence[Tensor],
) -> None:
    """Apply a foreach function of torch's to the tensors whose subset is everything."""
    whole = [(t, value) for t, subset, value in zip(tensors, subsets, values, strict=True) if subset is None]
    if whole:
        function([t for t, _ in whole], [value for _, value in whole])


def _by_way(
    tensors: Sequence[Tensor],
    subsets: Sequence[Subset | None],
    values: Sequence[Tensor],
    dtype: torch.dtype | None = None,
) -> tuple[list[Move], list[tuple[Tensor, Subset, Tensor]]]:
    """What one compiled call does for all; and what is done one after the other, so that copies never exist together.

    Args:
        tensors: some.
        subsets: of each; those that are everything are left out.
        values: of each.
        dtype: the only one that compiled code knows; None: it knows all.
    """
    compiled, chunked = [], []
    for t, subset, value in zip(tensors, subsets, values, strict=True):
        if subset is None:
            continue
        if subset.spans is not None and t.is_contiguous() and (dtype is None or t.dtype == value.dtype == dtype):
            compiled.append((t, subset.spans, value))
        else:
            chunked.append((t, subset, value))
    return compiled, chunked


def _gather(flat: Tensor, subset: Subset, values: Tensor) -> None:
    if subset.spans is not None:
        take([(flat, subset.spans, values)])
    else:
        subset.gather_chunks(flat, values)

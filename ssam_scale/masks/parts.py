"""The perturbed part of a shard, in a bit for each weight or less, and how its weights are moved out and in.

Nothing in here makes a temporary of the size of a shard: the CPU streams through it, other devices go in chunks.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ssam_scale.compiled import compiled
from ssam_scale.sharding.needs import Elements

_CHUNK = 1 << 22  # elements that another device than the CPU works on at a time; their indices are the temporary
_ROWS_CHUNK = 1 << 20  # elements of rows that are moved together


class Part(Elements, Protocol):
    """Some elements of a tensor, in row-major order whatever its strides."""

    def compact(self, source: Tensor) -> Tensor:
        """The elements of `source`, of shape (count,), in the front of its own memory where that is row-major."""

    def add(self, target: Tensor, values: Tensor) -> None:
        """Add `values`, of shape (count,) and at least as precise as `target`, to its elements, rounding once."""


class Bits:
    """Any elements: a bit for each.

    Args:
        packed: uint8 of shape (ceil(numel / 8),): bit j of byte i stands for element 8 · i + j; unused bits are 0.
        numel: elements of the tensor.
    """

    def __init__(self, packed: Tensor, numel: int) -> None:
        self.packed = packed
        self.numel = numel
        if _streams(packed):
            self.count = popcount(packed)
        else:  # asked for once, so that no step has to wait for the device
            self._chunks = [popcount(chunk) for chunk in packed.split(_CHUNK // 8)]
            self.count = sum(self._chunks)

    def take(self, source: Tensor) -> Tensor:
        """See `Part`."""
        return self._move_out(source.reshape(-1), source.new_empty(self.count))

    def compact(self, source: Tensor) -> Tensor:
        """See `Part`."""
        if not source.is_contiguous():
            return self.take(source)
        flat = source.view(-1)
        return self._move_out(flat, flat[: self.count])

    def _move_out(self, flat: Tensor, out: Tensor) -> Tensor:
        if _streams(flat):
            _take(_array(flat), self.packed.numpy(), _array(out))
            return out
        filled = 0
        for start, index in self._indices():
            values = flat[start : start + _CHUNK].index_select(0, index)  # never overlaps what was moved to the front
            out[filled : filled + len(index)] = values
            filled += len(index)
        return out

    def put(self, target: Tensor, values: Tensor) -> None:
        """See `Part`."""
        flat = target.reshape(-1)
        if _streams(flat):
            _put(_array(flat), self.packed.numpy(), _array(values))
        else:
            taken = 0
            for start, index in self._indices():
                flat[start : start + _CHUNK].index_copy_(0, index, values[taken : taken + len(index)])
                taken += len(index)
        _copy_back(flat, target)

    def add(self, target: Tensor, values: Tensor) -> None:
        """See `Part`."""
        if _streams(target) and target.is_contiguous() and target.dtype == values.dtype == torch.float32:
            _add(target.view(-1).numpy(), self.packed.numpy(), values.numpy())
        else:
            self.put(target, self.take(target).add_(values))

    def _indices(self) -> list[tuple[int, Tensor]]:
        """Of each chunk: where it starts and, from there, the indices of the elements."""
        return [
            (i * _CHUNK, torch.nonzero_static(unpack(packed), size=count).view(-1))
            for i, (packed, count) in enumerate(zip(self.packed.split(_CHUNK // 8), self._chunks, strict=True))
        ]

    def booleans(self) -> Tensor:
        """See `Part`."""
        return unpack(self.packed)[: self.numel]


class Rows:
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

    def take(self, source: Tensor) -> Tensor:
        """See `Part`."""
        return self._move_out(source.reshape(-1), source.new_empty(self.count))

    def compact(self, source: Tensor) -> Tensor:
        """See `Part`."""
        if not source.is_contiguous():
            return self.take(source)
        flat = source.view(-1)
        return self._move_out(flat, flat[: self.count])

    def _move_out(self, flat: Tensor, out: Tensor) -> Tensor:
        filled = 0
        if self._head_kept:
            filled = self._head
            out[:filled] = flat[:filled]
        body = self._body(flat)
        for rows in self.rows.split(max(1, _ROWS_CHUNK // self.size)):
            values = body.index_select(0, rows).view(-1)
            out[filled : filled + len(values)] = values
            filled += len(values)
        if self._tail_kept:
            out[filled:] = flat[self._tail :].clone()  # which may overlap
        return out

    def put(self, target: Tensor, values: Tensor) -> None:
        """See `Part`."""
        flat = target.reshape(-1)
        head = self._head * self._head_kept
        tail = head + len(self.rows) * self.size
        if head:
            flat[:head] = values[:head]
        if len(self.rows):
            self._body(flat).index_copy_(0, self.rows, values[head:tail].view(-1, self.size))
        if self._tail_kept:
            flat[self._tail :] = values[tail:]
        _copy_back(flat, target)

    def add(self, target: Tensor, values: Tensor) -> None:
        """See `Part`."""
        self.put(target, self.take(target).add_(values))

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


def _copy_back(flat: Tensor, target: Tensor) -> None:
    """Undo that a tensor in another order than row-major (channels last) had to be copied to be flat."""
    if not target.is_contiguous():
        target.copy_(flat.view(target.shape))


def _array(tensor: Tensor) -> np.ndarray:
    """A tensor on the CPU as numpy's integers of the same size: moving them does not care what they mean."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    array: np.ndarray = tensor.detach().view(integers[tensor.element_size()]).numpy()
    return array


@compiled
def _take(source: np.ndarray, packed: np.ndarray, out: np.ndarray) -> None:
    filled = 0
    count = len(out)
    for i in range(len(packed)):
        byte = packed[i]
        if byte == 0:
            continue
        for j in range(8):
            if filled < count:  # the last element's successors have nowhere to go
                # Without a branch on the bit, which nobody can predict.
                out[filled] = source[min(8 * i + j, len(source) - 1)]
                filled += (byte >> j) & 1


@compiled
def _put(target: np.ndarray, packed: np.ndarray, values: np.ndarray) -> None:
    taken = 0
    last = len(values) - 1
    for i in range(len(packed)):
        byte = packed[i]
        if byte == 0:
            continue
        for j in range(min(8, len(target) - 8 * i)):
            bit = (byte >> j) & 1
            place = 8 * i + j
            target[place] = values[min(taken, last)] if bit else target[place]
            taken += bit


@compiled
def _add(target: np.ndarray, packed: np.ndarray, values: np.ndarray) -> None:
    taken = 0
    last = len(values) - 1
    for i in range(len(packed)):
        byte = packed[i]
        if byte == 0:
            continue
        for j in range(min(8, len(target) - 8 * i)):
            bit = (byte >> j) & 1
            place = 8 * i + j
            target[place] = target[place] + values[min(taken, last)] if bit else target[place]
            taken += bit

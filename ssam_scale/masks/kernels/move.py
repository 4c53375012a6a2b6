"""Compiled masked select, scatter, add and stream compaction over lists of tensors in CPU memory.

One call serves all tensors, in as many threads as torch computes with: a call each would cost more than the work on a
small one. Where a thread begins is looked up, not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from ssam_scale.native import addresses, compiled, in_threads

# Elements between two places of a subset at which a thread may begin; a multiple of the 64 bits of a word.
_STRIDE = 1 << 16

# What numbers are moved as, by their size in bytes: moving them does not care what they mean.
_INTEGERS = {t().itemsize: np.zeros(0, t) for t in (np.int8, np.int16, np.int32, np.int64)}
_FLOATS = {4: np.zeros(0, np.float32)}


@intrinsic
def _at(context: Any, address: Any, like: Any) -> Any:
    """A pointer to numbers of `like`'s dtype."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(like.dtype)(address, like), generate


@intrinsic
def _lowest(context: Any, word: Any) -> Any:
    """The place of the lowest bit that is set."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], context.get_constant(types.boolean, 0))

    return types.int64(types.uint64), generate


@intrinsic
def _ones(context: Any, word: Any) -> Any:
    """How many bits are set."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.int64(types.uint64), generate


_WORDS, _BYTES = np.zeros(0, np.uint64), np.zeros(0, np.uint8)


@compiled
def _word(bits: int, place: int, stop: int) -> Any:
    """The bits of 64 elements, those from `stop` on being 0.

    Args:
        bits: address of a subset's bits, a multiple of 8.
        place: of the word.
        stop: elements that there are bits for.
    """
    if 64 * place + 64 <= stop:
        return _at(bits, _WORDS)[place]
    word = np.uint64(0)  # whose last bytes need not be ours to read
    for byte in range((stop + 7 - 64 * place) >> 3):
        word |= np.uint64(_at(bits, _BYTES)[8 * place + byte]) << np.uint64(8 * byte)
    return word


@compiled
def _count(bits: int, tasks: Any, counts: Any) -> None:
    """Of each task, how many bits are set."""
    for n in range(len(tasks)):
        start, stop = tasks[n, 1], tasks[n, 2]
        for place in range(start >> 6, (stop + 63) >> 6):
            counts[n] += _ones(_word(bits, place, stop))


# The bits that are set are looked for one after the other: what is not moved costs next to nothing, and there is no
# branch on a bit, which nobody can predict.


@compiled
def _take(tensors: Any, bits: Any, tasks: Any, values: Any, like: Any) -> None:
    """Copy elements of tensors to the rows of their values.

    Args:
        tensors: int64 [tensors], addresses.
        bits: int64 [tensors], addresses of a bit for each element; 0: every element of a task is moved.
        tasks: int64 [N, 4], the tensor, and a row of its `Spans.tasks`.
        values: int64 [tensors], addresses.
        like: of the dtype of both.
    """
    for n in range(len(tasks)):
        tensor, moved, start, stop = tasks[n, 0], tasks[n, 1], tasks[n, 2], tasks[n, 3]
        source, row = _at(tensors[tensor], like), _at(values[tensor], like)
        if bits[tensor] == 0:
            for i in range(stop - start):
                row[moved + i] = source[start + i]
            continue
        for place in range(start >> 6, (stop + 63) >> 6):
            word = _word(bits[tensor], place, stop)
            while word:
                row[moved] = source[64 * place + _lowest(word)]
                word &= word - np.uint64(1)
                moved += 1


@compiled
def _put(tensors: Any, bits: Any, tasks: Any, values: Any, like: Any) -> None:
    """Copy rows of values to elements of tensors. The arguments are those of `_take`."""
    for n in range(len(tasks)):
        tensor, moved, start, stop = tasks[n, 0], tasks[n, 1], tasks[n, 2], tasks[n, 3]
        target, row = _at(tensors[tensor], like), _at(values[tensor], like)
        if bits[tensor] == 0:
            for i in range(stop - start):
                target[start + i] = row[moved + i]
            continue
        for place in range(start >> 6, (stop + 63) >> 6):
            word = _word(bits[tensor], place, stop)
            while word:
                target[64 * place + _lowest(word)] = row[moved]
                word &= word - np.uint64(1)
                moved += 1


@compiled
def _add(tensors: Any, bits: Any, tasks: Any, values: Any, like: Any) -> None:
    """Add rows of values to elements of tensors. The arguments are those of `_take`."""
    for n in range(len(tasks)):
        tensor, moved, start, stop = tasks[n, 0], tasks[n, 1], tasks[n, 2], tasks[n, 3]
        target, row = _at(tensors[tensor], like), _at(values[tensor], like)
        if bits[tensor] == 0:
            for i in range(stop - start):
                target[start + i] += row[moved + i]
            continue
        for place in range(start >> 6, (stop + 63) >> 6):
            word = _word(bits[tensor], place, stop)
            while word:
                target[64 * place + _lowest(word)] += row[moved]
                word &= word - np.uint64(1)
                moved += 1


@dataclass(frozen=True, eq=False)
class Spans:
    """Where the elements of a subset lie: spans of the tensor, of which threads can take one each.

    Attributes:
        tasks: NumPy int64 [N, 3], a row for each span, in order: how many elements of the subset come before; the first
            element of the tensor and the one after the last. With bits, the first is a multiple of 64.
        bits: uint8, one bit for each element of the tensor, in memory that begins at a multiple of 8 bytes; None: the
            subset has every element of each span.
        count: elements of the subset.
        numel: elements of the tensor.
    """

    tasks: Any
    bits: Tensor | None
    count: int
    numel: int


Move: TypeAlias = tuple[Tensor, Spans, Tensor]
"""A row-major tensor, the spans of a subset of it, and the subset's values: shape (`Spans.count`,), of its dtype."""


def spans_of_bits(packed: Tensor, numel: int) -> Spans:
    """The spans of a packed bit mask on the CPU; the arguments are those of `BitMask`."""
    packed = packed.contiguous()
    if packed.data_ptr() % 8:
        packed = packed.clone()
    starts = np.arange(0, numel, _STRIDE, dtype=np.int64)
    tasks = np.stack([np.zeros_like(starts), starts, np.minimum(starts + _STRIDE, numel)], 1)
    counts = np.zeros(len(tasks), np.int64)
    _count(packed.data_ptr(), tasks, counts)
    tasks[:, 0] = counts.cumsum() - counts
    return Spans(tasks, packed, int(counts.sum()), numel)


def spans_of_rows(kept: Tensor, size: int, start: int, numel: int) -> Spans:
    """The spans of kept rows, of which neighbours make one span; the arguments are as of `Rows`.

    Args:
        kept: int64, indices of rows of the whole parameter, ascending.
        size: elements of a row.
        start: of the whole parameter, the first element that the tensor has.
        numel: elements of the tensor.
    """
    rows = kept.numpy()
    begins = np.diff(rows, prepend=-2) != 1
    ends = np.diff(rows, append=rows[-1:] + 2) != 1 if len(rows) else begins
    runs = np.clip(np.stack([rows[begins] * size, (rows[ends] + 1) * size], 1) - start, 0, numel)
    runs = runs[runs[:, 0] < runs[:, 1]]
    lengths = runs[:, 1] - runs[:, 0]
    before = lengths.cumsum() - lengths
    return Spans(np.concatenate([before[:, None], runs], 1), None, int(lengths.sum()), numel)


def take(moves: Sequence[Move]) -> None:
    """Copy elements of tensors to their values, which are not in the memory of any of the tensors.

    Args:
        moves: of any dtypes, the same in a tensor and its values.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    _move(_take, _INTEGERS, moves)


def compact(moves: Sequence[Move]) -> None:
    """`take`, where the values are the front of their tensor."""
    # One thread does all of a tensor: another one would overwrite what it has not read yet.
    _move(_take, _INTEGERS, moves, divided=False)


def put(moves: Sequence[Move]) -> None:
    """Copy values to elements of their tensors; the argument and errors are those of `take`."""
    _move(_put, _INTEGERS, moves)


def add(moves: Sequence[Move]) -> None:
    """Add values to elements of their tensors, float32; else as `put`."""
    _move(_add, _FLOATS, moves)


def _move(kernel: Callable[..., None], kinds: dict[int, Any], moves: Sequence[Move], *, divided: bool = True) -> None:
    by_size: dict[int, list[Move]] = {}
    for t, spans, row in moves:
        # Compiled loops write to memory unasked.
        fits = (t.numel(), row.shape, row.dtype) == (spans.numel, (spans.count,), t.dtype)
        if not (fits and t.is_contiguous() and row.is_contiguous()):
            raise ValueError(
                f"values of shape {tuple(row.shape)} and {row.dtype} do not fit {spans.count} of {spans.numel} "
                f"elements of a tensor of shape {tuple(t.shape)} and {t.dtype}, or one of the two is not row-major"
            )
        if spans.count:
            by_size.setdefault(t.element_size(), []).append((t, spans, row))
    for size, same in by_size.items():
        of_each = [len(spans.tasks) for _, spans, _ in same]
        tasks = np.empty((sum(of_each), 4), np.int64)
        tasks[:, 0] = np.repeat(np.arange(len(same)), of_each)
        np.concatenate([spans.tasks for _, spans, _ in same], out=tasks[:, 1:])
        where = addresses([t for t, _, _ in same]), np.array([_address(spans.bits) for _, spans, _ in same], np.int64)
        rows = addresses([row for _, _, row in same])
        edges = np.arange(len(tasks) + 1) if divided else np.concatenate([[0], np.cumsum(of_each)])
        units = np.stack([tasks[edges[:-1], 2], tasks[edges[1:] - 1, 3]], 1)

        def work(part: slice) -> None:
            kernel(*where, tasks[edges[part.start] : edges[part.stop]], rows, kinds[size])  # noqa: B023  (called in here)

        in_threads(work, units)


def _address(bits: Tensor | None) -> int:
    return 0 if bits is None else bits.data_ptr()

"""Compiled masked select, scatter, add and sum of squares over lists of tensors in CPU memory.

One call serves all tensors, in as many threads as torch computes with: a call each would cost more than the work on a
small one. Where a thread begins is looked up, not counted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numba import types
from numba.extending import intrinsic
from torch import Tensor, float32

from ssam_scale.masks.backup import Backup
from ssam_scale.native import addresses, compiled, in_threads

# Elements between two places of a subset at which a thread may begin; a multiple of the 64 bits of a word.
_STRIDE = 1 << 16

# What numbers are moved as, by their size in bytes: moving them does not care what they mean.
_INTEGERS = {t().itemsize: np.zeros(0, t) for t in (np.int8, np.int16, np.int32, np.int64)}
_FLOAT = np.zeros(0, np.float32)


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


_WORDS = np.zeros(0, np.uint64)


@compiled
def _count(bits: int, tasks: Any, counts: Any) -> None:
    """Of each task, how many bits are set."""
    for n in range(len(tasks)):
        start, stop = tasks[n, 1], tasks[n, 2]
        for place in range(start >> 6, (stop + 63) >> 6):
            counts[n] += _ones(_at(bits, _WORDS)[place])


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
        source = _at(tensors[tensor] + start * like.itemsize, like)
        row = _at(values[tensor] + moved * like.itemsize, like)
        if bits[tensor] == 0:
            for i in range(stop - start):
                row[i] = source[i]
            continue
        words, k = _at(bits[tensor] + (start >> 3), _WORDS), 0
        for place in range((stop - start + 63) >> 6):
            word = words[place]
            while word:
                row[k] = source[64 * place + _lowest(word)]
                word &= word - np.uint64(1)
                k += 1


@compiled
def _put(tensors: Any, bits: Any, tasks: Any, values: Any, like: Any) -> None:
    """Copy rows of values to elements of tensors. The arguments are those of `_take`."""
    for n in range(len(tasks)):
        tensor, moved, start, stop = tasks[n, 0], tasks[n, 1], tasks[n, 2], tasks[n, 3]
        target = _at(tensors[tensor] + start * like.itemsize, like)
        row = _at(values[tensor] + moved * like.itemsize, like)
        if bits[tensor] == 0:
            for i in range(stop - start):
                target[i] = row[i]
            continue
        words, k = _at(bits[tensor] + (start >> 3), _WORDS), 0
        for place in range((stop - start + 63) >> 6):
            word = words[place]
            while word:
                target[64 * place + _lowest(word)] = row[k]
                word &= word - np.uint64(1)
                k += 1


@compiled
def _add(tensors: Any, bits: Any, tasks: Any, values: Any, compact: Any, alphas: Any, before: Any, done: Any) -> None:
    """Add multiples of values to elements of tensors, and keep what they were before; all of it float32.

    Args:
        tensors: as of `_take`.
        bits: as of `_take`.
        tasks: as of `_take`.
        values: int64 [tensors], addresses.
        compact: bool [tensors], whether the values are those of the elements only, and not of the whole tensor.
        alphas: float32 [tensors], what values are multiplied by, in float32, before they are added.
        before: int64 [tensors], addresses of copies of the elements; 0: none is made.
        done: bool [tasks], becomes true.
    """
    for n in range(len(tasks)):
        tensor, moved, start, stop = tasks[n, 0], tasks[n, 1], tasks[n, 2], tasks[n, 3]
        packed, kept, alpha = compact[tensor], before[tensor] != 0, alphas[tensor]
        target = _at(tensors[tensor] + 4 * start, _FLOAT)
        summand = _at(values[tensor] + 4 * (moved if packed else start), _FLOAT)
        row = _at(before[tensor] + 4 * moved, _FLOAT)
        if bits[tensor] == 0 and kept:
            for i in range(stop - start):
                old = target[i]
                row[i] = old
                target[i] = old + alpha * summand[i]
        elif bits[tensor] == 0:
            for i in range(stop - start):
                target[i] += alpha * summand[i]
        else:
            words, k = _at(bits[tensor] + (start >> 3), _WORDS), 0
            for place in range((stop - start + 63) >> 6):
                word = words[place]
                while word:
                    i = 64 * place + _lowest(word)
                    old = target[i]
                    if kept:
                        row[k] = old
                    target[i] = old + alpha * summand[k if packed else i]
                    word &= word - np.uint64(1)
                    k += 1
        done[n] = True


# So many sums are kept side by side: an addition need not wait for the one before.
_LANES = 64


@compiled
def _squares(tensors: Any, bits: Any, tasks: Any, sums: Any) -> None:
    """Add up the squares of elements of float32 tensors, in float64.

    Args:
        tensors: as of `_take`.
        bits: as of `_take`.
        tasks: as of `_take`.
        sums: float64 [tensors, 2], added to: of the subset, and, where there are bits, of all elements of the tasks.
    """
    chosen, every = np.zeros(_LANES), np.zeros(_LANES)
    zero = 0.0
    for n in range(len(tasks)):
        tensor, start, stop = tasks[n, 0], tasks[n, 2], tasks[n, 3]
        source = _at(tensors[tensor], _FLOAT)
        place = start
        if bits[tensor] == 0:
            while place + _LANES <= stop:
                for i in range(_LANES):
                    x = np.float64(source[place + i])
                    chosen[i] += x * x
                place += _LANES
            for i in range(stop - place):
                x = np.float64(source[place + i])
                chosen[i] += x * x
        else:
            words = _at(bits[tensor], _WORDS)
            while place + _LANES <= stop:
                word = words[place >> 6]
                for i in range(_LANES):
                    x = np.float64(source[place + i])
                    every[i] += x * x
                    chosen[i] += x * x if (word >> np.uint64(i)) & np.uint64(1) else zero
                place += _LANES
            if place < stop:
                word = words[place >> 6]
                for i in range(stop - place):
                    x = np.float64(source[place + i])
                    every[i] += x * x
                    chosen[i] += x * x if (word >> np.uint64(i)) & np.uint64(1) else zero
        if n + 1 == len(tasks) or tasks[n + 1, 0] != tensor:
            sums[tensor, 0] += chosen.sum()
            sums[tensor, 1] += every.sum()
            chosen[:] = 0.0
            every[:] = 0.0


@dataclass(frozen=True, eq=False)
class Spans:
    """Where the elements of a subset lie: spans of the tensor, of which threads can take one each.

    Attributes:
        tasks: NumPy int64 [N, 3], a row for each span, in order: how many elements of the subset come before; the first
            element of the tensor and the one after the last. With bits, the first is a multiple of 64.
        bits: uint8, one bit for each element of the tensor, as words of 64, the last ones 0; None: the subset has every
            element of each span.
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
    """The spans of a packed bit mask on the CPU, whose bits are `packed`, or a copy where that are no whole words.

    Args:
        packed: as of `BitMask`.
        numel: as of `BitMask`.

    Raises:
        ValueError: they do not fit: compiled loops go by every bit that is set.
    """
    if len(packed) != -(-numel // 8) or (numel % 8 and int(packed[-1]) >> numel % 8):
        raise ValueError(f"{len(packed)} bytes of bits do not stand for {numel} elements, or for more than these")
    if packed.data_ptr() % 8 or len(packed) % 8 or not packed.is_contiguous():
        words = packed.new_zeros(-(-len(packed) // 8) * 8)
        words[: len(packed)] = packed
        packed = words
    starts = np.arange(0, numel, _STRIDE, dtype=np.int64)
    tasks = np.stack([np.zeros_like(starts), starts, np.minimum(starts + _STRIDE, numel)], 1)
    counts = np.zeros(len(tasks), np.int64)
    _count(packed.data_ptr(), tasks, counts)
    tasks[:, 0] = counts.cumsum() - counts
    return Spans(tasks, packed, int(counts.sum()), numel)


@functools.lru_cache(1024)
def spans_of_all(numel: int) -> Spans:
    """The spans of all elements of a tensor."""
    starts = np.arange(0, numel, _STRIDE, dtype=np.int64)
    return Spans(np.stack([starts, starts, np.minimum(starts + _STRIDE, numel)], 1), None, numel, numel)


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


def streams(tensor: Tensor) -> bool:
    """Whether compiled code works on `tensor`'s memory."""
    return tensor.is_cpu


def take(moves: Sequence[Move]) -> None:
    """Copy elements of tensors to their values, which are not in the memory of any of the tensors.

    Args:
        moves: of any dtypes, the same in a tensor and its values.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    _move(_take, moves)


def put(moves: Sequence[Move]) -> None:
    """Copy values to elements of their tensors; the argument and errors are those of `take`."""
    _move(_put, moves)


def add(moves: Sequence[Move], alphas: Sequence[float], backup: Backup | None = None) -> None:
    """Add alpha · value to elements of their tensors: two roundings to float32, of the product and of the sum.

    Args:
        moves: of float32; values may also be those of the whole tensor, row-major: of its number of elements.
        alphas: of each.
        backup: keeps the elements as they were; None: nothing does.

    Raises:
        ValueError: as of `take`.
    """
    _check(moves, wholes=True)
    if not moves:
        return
    batch = _Batch([(t, spans) for t, spans, _ in moves])
    done = np.zeros(len(batch.tasks), np.bool_)
    before = np.zeros(len(moves), np.int64)
    if backup is not None:
        counts = np.array([spans.count for _, spans, _ in moves], np.int64)
        memory = backup.memory(int(counts.sum()))
        before = memory.data_ptr() + 4 * (counts.cumsum() - counts)

        def undo() -> None:
            assert memory is not None  # and stays alive until here
            batch.run(_put, before, _INTEGERS[4], only=done)

        backup.keep(undo)
    values = addresses([value for _, _, value in moves])
    compact = np.array([value.numel() != spans.numel for _, spans, value in moves], np.bool_)
    factors = np.array(alphas, np.float32)

    def work(part: slice) -> None:
        _add(batch.tensors, batch.bits, batch.tasks[part], values, compact, factors, before, done[part])

    in_threads(work, batch.tasks)


def squares(tensors: Sequence[Tensor], subsets: Sequence[Spans]) -> Any:
    """NumPy float64 [tensors, 2]: Σ x² of a subset of each tensor, and, where it has bits, of the whole tensor.

    Args:
        tensors: row-major, float32.
        subsets: of each.

    Raises:
        ValueError: a subset is not of its tensor, or the tensor is not such.
    """
    both = list(zip(tensors, subsets, strict=True))
    if any(t.numel() != spans.numel or t.dtype != float32 or not t.is_contiguous() for t, spans in both):
        raise ValueError("a subset is not of its tensor, or the tensor is not row-major float32")
    batch = _Batch(both)
    by_part = {}

    def work(part: slice) -> None:
        by_part[part.start] = sums = np.zeros((len(tensors), 2))
        _squares(batch.tensors, batch.bits, batch.tasks[part], sums)

    in_threads(work, batch.tasks)
    return sum((by_part[start] for start in sorted(by_part)), np.zeros((len(tensors), 2)))


class _Batch:
    """What a compiled loop is told of subsets of some tensors.

    Attributes:
        tensors: addresses, as of `_take`.
        bits: as of `_take`.
        tasks: as of `_take`.
    """

    def __init__(self, subsets: Sequence[tuple[Tensor, Spans]]) -> None:
        of_each = [len(spans.tasks) for _, spans in subsets]
        self.tasks = np.empty((sum(of_each), 4), np.int64)
        self.tasks[:, 0] = np.repeat(np.arange(len(subsets)), of_each)
        if of_each:
            np.concatenate([spans.tasks for _, spans in subsets], out=self.tasks[:, 1:])
        self.tensors = addresses([t for t, _ in subsets])
        self.bits = np.array([0 if s.bits is None else s.bits.data_ptr() for _, s in subsets], np.int64)
        self._alive = subsets

    def run(self, kernel: Callable[..., None], values: Any, like: Any, only: Any = None) -> None:
        """`_take` or `_put`.

        Args:
            kernel: which.
            values: addresses.
            like: of the dtype.
            only: bool [tasks], which of them; None: all.
        """
        tasks = self.tasks if only is None or only.all() else self.tasks[only]
        in_threads(lambda part: kernel(self.tensors, self.bits, tasks[part], values, like), tasks)


def _move(kernel: Callable[..., None], moves: Sequence[Move]) -> None:
    _check(moves)
    by_size: dict[int, list[Move]] = {}
    for move in moves:
        if move[1].count:
            by_size.setdefault(move[0].element_size(), []).append(move)
    for size, same in by_size.items():
        batch = _Batch([(t, spans) for t, spans, _ in same])
        batch.run(kernel, addresses([row for _, _, row in same]), _INTEGERS[size])


def _check(moves: Sequence[Move], *, wholes: bool = False) -> None:
    """Compiled loops write to memory unasked."""
    for t, spans, row in moves:
        fits = t.numel() == spans.numel and row.dtype == t.dtype and t.is_contiguous() and row.is_contiguous()
        if not fits or (row.shape != (spans.count,) and not (wholes and row.numel() == spans.numel)):
            raise ValueError(
                f"values of shape {tuple(row.shape)} and {row.dtype} do not fit {spans.count} of {spans.numel} "
                f"elements of a tensor of shape {tuple(t.shape)} and {t.dtype}, or one of the two is not row-major"
            )

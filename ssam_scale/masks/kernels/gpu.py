"""Masked select, scatter, add and norms on a GPU: one Triton launch for a list of tensors, over a table of pointers.

The same functions as `flat`'s, which need a dozen launches, index tensors and copies for each few million elements. A
program (a block of threads) has the next `BLOCK` elements of one tensor, in row-major order whatever its strides; where
they begin among those that the subset has was counted when the subset was new.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ssam_scale.masks.flat import by_kind

if TYPE_CHECKING:
    from ssam_scale.masks.backup import Backup
    from ssam_scale.masks.subset import Subset

BLOCK = 1024
"""Elements of a program."""

_DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_MOST = 2**31 - BLOCK  # elements of a tensor, which are counted in 32 bits

# Columns of the table, of which each tensor has a row: addresses of the tensor, of its values, of its subset's bits and
# of what is kept of it; its number of elements; the layouts of it and of its values; bits of a float64 factor.
_COLUMNS: tl.constexpr = tl.constexpr(10)


@triton.jit
def _elements(table, blocks, BLOCK: tl.constexpr):
    """This program's row of the table, the places of its elements in the tensor, and which of them the subset has."""
    own = blocks + tl.program_id(0).to(tl.int64) * 3
    row = table + tl.load(own).to(tl.int64) * _COLUMNS
    i = tl.load(own + 1) * BLOCK + tl.arange(0, BLOCK)
    bits = tl.load(row + 2).to(tl.pointer_type(tl.uint8))
    byte = tl.load(bits + (i >> 3), mask=i < tl.load(row + 4), other=0)
    return row, i, ((byte.to(tl.int32) >> (i & 7)) & 1) != 0


@triton.jit
def _places(blocks, kept):
    """Where the elements that the subset has are among all of them in the tensor."""
    first = tl.load(blocks + tl.program_id(0).to(tl.int64) * 3 + 2)
    return first + tl.cumsum(kept.to(tl.int32), 0) - 1


@triton.jit
def _in_memory(row, column, i, STRIDED: tl.constexpr):
    """Where row-major elements (outer, channels, inner) lie in channels_last memory (outer, inner, channels)."""
    if STRIDED:
        inner = tl.load(row + column).to(tl.int32)
        channels = tl.load(row + column + 1).to(tl.int32)
        within = i % (inner * channels)
        i = i - within + (within % inner) * channels + within // inner
    return i


@triton.jit
def _count(table, blocks, counts, BLOCK: tl.constexpr):
    _, _, kept = _elements(table, blocks, BLOCK)
    tl.store(counts + tl.program_id(0), tl.sum(kept.to(tl.int32), 0))


@triton.jit
def _select(table, blocks, T: tl.constexpr, STRIDED: tl.constexpr, BLOCK: tl.constexpr):
    row, i, kept = _elements(table, blocks, BLOCK)
    tensor = tl.load(row).to(tl.pointer_type(T))
    values = tl.load(row + 1).to(tl.pointer_type(T))
    x = tl.load(tensor + _in_memory(row, 5, i, STRIDED), mask=kept)
    tl.store(values + _places(blocks, kept), x, mask=kept)


@triton.jit
def _scatter(table, blocks, T: tl.constexpr, STRIDED: tl.constexpr, BLOCK: tl.constexpr):
    row, i, kept = _elements(table, blocks, BLOCK)
    tensor = tl.load(row).to(tl.pointer_type(T))
    values = tl.load(row + 1).to(tl.pointer_type(T))
    x = tl.load(values + _places(blocks, kept), mask=kept)
    tl.store(tensor + _in_memory(row, 5, i, STRIDED), x, mask=kept)


@triton.jit
def _squares(table, blocks, sums, T: tl.constexpr, WIDE: tl.constexpr, STRIDED: tl.constexpr, BLOCK: tl.constexpr):
    row, i, kept = _elements(table, blocks, BLOCK)
    tensor = tl.load(row).to(tl.pointer_type(T))
    x = tl.load(tensor + _in_memory(row, 5, i, STRIDED), mask=kept, other=0.0).to(WIDE)
    tl.store(sums + tl.program_id(0), tl.sum(x * x, 0))


@triton.jit
def _total(sums, bounds, totals, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Sums of the programs of a tensor, in an order that is always the same."""
    at, last = tl.load(bounds + tl.program_id(0)), tl.load(bounds + tl.program_id(0) + 1)
    found = tl.zeros((BLOCK,), WIDE)
    while at < last:
        i = at + tl.arange(0, BLOCK)
        found += tl.load(sums + i, mask=i < last, other=0.0)
        at += BLOCK
    tl.store(totals + tl.program_id(0), tl.sum(found, 0))


@triton.jit
def _add(
    table,
    blocks,
    alpha,
    when,
    T: tl.constexpr,
    V: tl.constexpr,
    WIDE: tl.constexpr,
    STRIDED: tl.constexpr,
    WHOLE: tl.constexpr,
    V_STRIDED: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, i, kept = _elements(table, blocks, BLOCK)
    tensor = tl.load(row).to(tl.pointer_type(T)) + _in_memory(row, 5, i, STRIDED)
    old = tl.load(tensor, mask=kept)
    if KEEP or not WHOLE:
        places = _places(blocks, kept)
    if KEEP:
        tl.store(tl.load(row + 3).to(tl.pointer_type(T)) + places, old, mask=kept)
    values = tl.load(row + 1).to(tl.pointer_type(V))
    values += _in_memory(row, 7, i, V_STRIDED) if WHOLE else places
    x = tl.load(values, mask=kept).to(WIDE)
    if alpha is not None:
        scale = tl.load(alpha)
        x *= (scale * tl.load(row + 9).to(tl.float64, bitcast=True).to(scale.dtype)).to(WIDE)
    new = old.to(WIDE) + x
    if T.primitive_bitwidth < 32:
        new = new.to(tl.float32)  # torch's way from float64, too
    new = new.to(T)
    if when is not None:
        new = tl.where(tl.load(when), new, old)
    tl.store(tensor, new, mask=kept)


class _Table:
    """What is known of a list of subsets before there are tensors: which program has which elements.

    Args:
        subsets: at least one, of at least one element together.
    """

    def __init__(self, subsets: Sequence[Subset]) -> None:
        self._others = subsets[1:]  # whose addresses are known here; the first holds this
        self._device = subsets[0].device
        self._bits = np.array([s.bits.data_ptr() for s in subsets])
        self._numels = np.array([s.numel for s in subsets])
        self._counts = np.array([s.count for s in subsets])
        numbers = -(-self._numels // BLOCK)
        bounds = np.concatenate([[0], np.cumsum(numbers)])
        self.programs = int(bounds[-1])
        self.bounds = _sent(bounds.astype(np.int32), self._device)
        owners = np.repeat(np.arange(len(subsets)), numbers)
        within = np.arange(self.programs) - bounds[owners]
        blocks = _sent(np.stack([owners, within, np.zeros_like(owners)], 1).astype(np.int32), self._device)
        self._known: dict[str, tuple[Hashable, Tensor]] = {}
        counts = torch.empty(self.programs, dtype=torch.int32, device=self._device)
        with self._here():
            _count[(self.programs,)](self.rows("bits"), blocks, counts, BLOCK=BLOCK)
        before = counts.cumsum(0) - counts
        blocks[:, 2] = before - before[_sent(bounds[owners], self._device)]
        self.blocks = blocks

    def rows(
        self,
        use: str,
        tensors: Sequence[Tensor] = (),
        values: Sequence[Tensor] = (),
        kept: Tensor | None = None,
        factors: Sequence[float] | None = None,
    ) -> Tensor:
        """The table of pointers. What was sent the last time serves again while it is the same.

        Args:
            use: by which the last time is known.
            tensors: of the subsets.
            values: of each tensor.
            kept: memory of the tensors' dtype for all values, one after the other.
            factors: of each tensor.
        """
        addresses, places = [t.data_ptr() for t in tensors], [v.data_ptr() for v in values]
        memory = None if kept is None else kept.data_ptr()
        key = (tuple(addresses), tuple(places), memory, None if factors is None else tuple(factors))
        known = self._known.get(use)
        if known is None or known[0] != key:
            rows = np.zeros((len(self._bits), _COLUMNS.value), np.int64)
            if tensors:
                rows[:, 0], rows[:, 5:7] = addresses, [_layout(t) for t in tensors]
            if values:
                rows[:, 1], rows[:, 7:9] = places, [_layout(v) for v in values]
            rows[:, 2], rows[:, 4] = self._bits, self._numels
            if kept is not None:
                rows[:, 3] = kept.data_ptr() + kept.element_size() * (np.cumsum(self._counts) - self._counts)
            if factors is not None:
                rows[:, 9] = np.array(factors, np.float64).view(np.int64)
            known = self._known[use] = key, _sent(rows, self._device)
        return known[1]

    def launch(self, kernel: Any, rows: Tensor, *arguments: Any, **constants: Any) -> None:
        """A program for each block of elements."""
        with self._here():
            kernel[(self.programs,)](rows, self.blocks, *arguments, **constants, BLOCK=BLOCK)

    def totals(self, sums: Tensor) -> Tensor:
        """The sum of each tensor's programs' results."""
        result = sums.new_empty(len(self._bits))
        with self._here():
            _total[(len(self._bits),)](sums, self.bounds, result, WIDE=_DTYPES[sums.dtype], BLOCK=BLOCK)
        return result

    def _here(self) -> Any:
        return torch.cuda.device(self._device if self._device.type == "cuda" else -1)


def _table(subsets: Sequence[Subset]) -> _Table:
    """Made once; it is kept where the subsets are, and ends with them."""
    first: Any = subsets[0]
    key = tuple(id(s) for s in subsets)
    if key not in first.tables:
        first.tables[key] = _Table(subsets)
    table: _Table = first.tables[key]
    return table


def _sent(array: Any, device: torch.device) -> Tensor:
    """On its way to the device, for which the host does not wait."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _layout(t: Tensor) -> tuple[int, int]:
    """Inner elements and channels, where channels are innermost in memory; (1, 1) where memory is row-major."""
    return (1, 1) if t.is_contiguous() else (t[0, 0].numel(), t.shape[1])


def _strided(t: Tensor) -> bool:
    return not t.is_contiguous()


def check() -> None:
    """Compile and run a kernel on the current GPU; raises whatever keeps Triton from it."""
    sums = torch.ones(3, device="cuda")
    bounds, total = torch.zeros(2, dtype=torch.int32, device="cuda"), torch.empty(1, device="cuda")
    _total[(1,)](sums, bounds, total, WIDE=tl.float32, BLOCK=BLOCK)


def takes(tensors: Sequence[Tensor]) -> bool:
    """Whether the functions here work on `tensors`, of subsets with elements: in dtype, size and layout."""
    return all(_takes(t) for t in tensors)


def _takes(t: Tensor) -> bool:
    if t.dtype not in _DTYPES or t.numel() >= _MOST:
        return False
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(t.ndim, torch.contiguous_format)
    return t.is_contiguous() or t.is_contiguous(memory_format=last)


def _kinds(subsets: Sequence[Subset], kind: Callable[[int], Any]) -> list[tuple[Any, list[int]]]:
    """The places of each kind, of subsets that have an element."""
    some = [i for i, subset in enumerate(subsets) if subset.count]
    return [(found, [some[k] for k in places]) for found, places in by_kind([kind(i) for i in some]).items()]


def _alike(tensors: Sequence[Tensor], subsets: Sequence[Subset]) -> list[tuple[Any, list[int]]]:
    """The places of each dtype and layout that a kernel is compiled for."""
    return _kinds(subsets, lambda i: (tensors[i].dtype, _strided(tensors[i])))


def _parts(memory: Tensor, subsets: Sequence[Subset]) -> list[Tensor]:
    return list(memory.split([s.count for s in subsets]))


def select(tensors: Sequence[Tensor], subsets: Sequence[Subset]) -> list[Tensor]:
    """See `flat.select`."""
    found = [t.new_empty(0) for t in tensors]
    for (dtype, strided), places in _alike(tensors, subsets):
        theirs = [subsets[i] for i in places]
        same = [tensors[i] for i in places]
        memory = same[0].new_empty(sum(s.count for s in theirs))
        values = _parts(memory, theirs)
        table = _table(theirs)
        table.launch(_select, table.rows("select", same, values), T=_DTYPES[dtype], STRIDED=strided)
        for i, value in zip(places, values, strict=True):
            found[i] = value
    return found


def scatter_(tensors: Sequence[Tensor], subsets: Sequence[Subset], values: Sequence[Tensor]) -> None:
    """See `flat.scatter_`."""
    for (dtype, strided), places in _alike(tensors, subsets):
        table = _table([subsets[i] for i in places])
        rows = table.rows("scatter", [tensors[i] for i in places], [values[i].contiguous() for i in places])
        table.launch(_scatter, rows, T=_DTYPES[dtype], STRIDED=strided)


def norms(tensors: Sequence[Tensor], subsets: Sequence[Subset]) -> list[Tensor]:
    """See `flat.norms`."""
    found = [t.new_zeros((), dtype=_wide(t.dtype)) if not s.count else t for t, s in zip(tensors, subsets, strict=True)]
    for (dtype, strided), places in _alike(tensors, subsets):
        table = _table([subsets[i] for i in places])
        wide = _wide(dtype)
        sums = torch.empty(table.programs, dtype=wide, device=tensors[places[0]].device)
        rows = table.rows("norms", [tensors[i] for i in places])
        table.launch(_squares, rows, sums, T=_DTYPES[dtype], WIDE=_DTYPES[wide], STRIDED=strided)
        for i, norm in zip(places, table.totals(sums).sqrt_().unbind(), strict=True):
            found[i] = norm
    return found


def _wide(*dtypes: torch.dtype) -> torch.dtype:
    """In what is computed."""
    wide = torch.float32
    for dtype in dtypes:
        wide = torch.promote_types(wide, dtype)
    return wide


def add_(
    tensors: Sequence[Tensor],
    subsets: Sequence[Subset],
    values: Sequence[Tensor],
    *,
    alpha: Tensor | None = None,
    factors: Sequence[float] | None = None,
    when: Tensor | None = None,
    backup: Backup | None = None,
) -> None:
    """See `flat.add_`; of subsets only."""
    values = [v if _takes(v) else v.contiguous() for v in values]

    def kind(i: int) -> tuple[Any, ...]:
        t, v = tensors[i], values[i]
        whole = v.numel() == t.numel()
        return t.dtype, v.dtype, _strided(t), whole, whole and _strided(v)

    for (dtype, of_values, strided, whole, v_strided), places in _kinds(subsets, kind):
        same, theirs = [tensors[i] for i in places], [subsets[i] for i in places]
        table = _table(theirs)
        kept = None if backup is None else same[0].new_empty(sum(s.count for s in theirs))
        if backup is not None and kept is not None:
            backup.keep(partial(scatter_, same, theirs, _parts(kept, theirs)))
        rows = table.rows(
            "add",
            same,
            [values[i] for i in places],
            kept,
            None if alpha is None else [1.0 if factors is None else factors[i] for i in places],
        )
        table.launch(
            _add,
            rows,
            alpha,
            when,
            T=_DTYPES[dtype],
            V=_DTYPES[of_values],
            WIDE=_DTYPES[_wide(dtype, of_values)],
            STRIDED=strided,
            WHOLE=whole,
            V_STRIDED=v_strided,
            KEEP=kept is not None,
        )

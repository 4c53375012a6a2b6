"""Masked select, scatter and add in plain torch, by few large launches and without waiting for the device.

The tensors of a call are worked on in groups of so many elements: those of a group, one after the other, make a vector;
a large tensor goes into several groups. A group's indices are made from the bits of its mask whenever they are needed,
so that those of one group exist at a time.

This is the way of all devices but the CPU, and of what the CPU's compiled loops do not know.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .backup import Backup
    from .subset import Subset

LIMIT = 1 << 23
"""Elements of a group. A multiple of 8: pieces of tensors begin where a byte of bits does."""


@dataclass(slots=True)
class _Piece:
    """What a group has of one tensor.

    Attributes:
        index: of the tensor.
        start: its first element, row-major.
        stop: the one after its last.
        first: of the tensor's values, the first that lies in here.
        count: how many do.
    """

    index: int
    start: int
    stop: int
    first: int
    count: int


@dataclass(frozen=True)
class _Group:
    """Pieces that are worked on together.

    Attributes:
        pieces: in the order of the tensors.
        first: of the values of all tensors one after the other, the first that lies in here.
        count: how many do.
    """

    pieces: tuple[_Piece, ...]
    first: int
    count: int

    @property
    def values(self) -> slice:
        """Of the values of all tensors."""
        return slice(self.first, self.first + self.count)


class _Grouped:
    """Subsets of tensors, group by group.

    Args:
        tensors: of one dtype, on one device.
        subsets: of each; or of each None: all of it.
        limit: elements of a group; None: `LIMIT`. A larger tensor that is not row-major makes a group all the same.

    Attributes:
        counts: values of each tensor.
        groups: all of them that have any values.
    """

    def __init__(self, tensors: Sequence[Tensor], subsets: Sequence[Subset | None], limit: int | None) -> None:
        limit = limit or LIMIT
        self._tensors, self._subsets = tensors, subsets
        self._everything = all(s is None for s in subsets)
        self.counts = [t.numel() if s is None else s.count for t, s in zip(tensors, subsets, strict=True)]
        self.groups: list[_Group] = []
        pieces: list[_Piece] = []
        length = 0
        for index in range(len(tensors)):
            for piece in self._pieces(index, limit):
                padded = self._padded(piece)
                if length + padded > limit:
                    self._close(pieces)
                    pieces, length = [], 0
                pieces.append(piece)
                length += padded
        self._close(pieces)
        self._powers = None if self._everything or not tensors else powers_of_two(tensors[0].device)

    def _pieces(self, index: int, limit: int) -> list[_Piece]:
        t, subset, count = self._tensors[index], self._subsets[index], self.counts[index]
        numel = t.numel()
        if not count:
            return []
        if numel <= limit or not t.is_contiguous():
            return [_Piece(index, 0, numel, 0, count)]
        first, result = 0, []
        starts = range(0, numel, limit)
        counts = [min(limit, numel - start) for start in starts] if subset is None else subset.counts(limit)
        for start, count in zip(starts, counts, strict=True):
            if count:
                result.append(_Piece(index, start, min(start + limit, numel), first, count))
            first += count
        return result

    def _padded(self, piece: _Piece) -> int:
        length = piece.stop - piece.start
        return length if self._everything else -(-length // 8) * 8

    def _close(self, pieces: Sequence[_Piece]) -> None:
        if pieces:
            before = self.groups[-1].values.stop if self.groups else 0
            self.groups.append(_Group(tuple(pieces), before, sum(p.count for p in pieces)))

    def joined(self, group: _Group, tensors: Sequence[Tensor]) -> Tensor:
        """The pieces as one vector, row-major, each padded to whole bytes of bits where there are any.

        Args:
            group: which pieces.
            tensors: of which; those that are grouped, or others of the same numbers of elements.
        """
        if len(group.pieces) == 1:
            return _of(tensors, group.pieces[0])
        parts, padding = [], tensors[0].new_empty(8)
        for piece in group.pieces:
            parts.append(_of(tensors, piece))
            if missing := self._padded(piece) - parts[-1].numel():
                parts.append(padding[:missing])
        return torch.cat(parts)

    def write(self, group: _Group, vector: Tensor) -> None:
        """Write a vector as `joined` returns it to the grouped tensors, whose dtype it has."""
        targets, sources, offset = [], [], 0
        for piece in group.pieces:
            t, length = self._tensors[piece.index], piece.stop - piece.start
            source = vector[offset : offset + length]
            offset += self._padded(piece)
            if t.is_contiguous():
                targets.append(_of(self._tensors, piece))
                sources.append(source)
            else:  # alone: among others it would keep them from being copied together
                t.copy_(source.view(t.shape))
        if targets:
            torch._foreach_copy_(targets, sources)

    def indices(self, group: _Group) -> Tensor:
        """Where in the vector of the group its values are: int64 of shape (count,)."""
        bits = []
        for piece in group.pieces:
            subset = self._subsets[piece.index]
            assert subset is not None
            bits.append(subset.bits[piece.start // 8 : -(-piece.stop // 8)])
        packed = bits[0] if len(bits) == 1 else torch.cat(bits)
        assert self._powers is not None
        return torch.nonzero_static((packed[:, None] & self._powers).view(-1), size=group.count).view(-1)

    def put(self, group: _Group, values: Tensor) -> None:
        """Write values, of the tensors' dtype and of shape (count,), to their places."""
        if self._everything:
            self.write(group, values)
            return
        vector = self.joined(group, self._tensors)
        vector.index_copy_(0, self.indices(group), values)
        if not self.in_place(group):
            self.write(group, vector)

    def in_place(self, group: _Group) -> bool:
        """Whether the vector that `joined` makes of the grouped tensors is their own memory."""
        return len(group.pieces) == 1 and self._tensors[group.pieces[0].index].is_contiguous()


def _of(tensors: Sequence[Tensor], piece: _Piece) -> Tensor:
    vector = tensors[piece.index].reshape(-1)
    whole = piece.stop - piece.start == vector.numel()
    return vector if whole else vector[piece.start : piece.stop]


def powers_of_two(device: torch.device) -> Tensor:
    """1, 2, 4, … 128: the bits of a byte, uint8. Made on the device, for sending it there would make the host wait."""
    return torch.bitwise_left_shift(1, torch.arange(8, dtype=torch.uint8, device=device))


_Kind = TypeVar("_Kind", bound=Hashable)


def by_kind(kinds: Sequence[_Kind]) -> dict[_Kind, list[int]]:
    """The places of each kind."""
    places: dict[_Kind, list[int]] = {}
    for place, kind in enumerate(kinds):
        places.setdefault(kind, []).append(place)
    return places


def together(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Both lists of tensors, row-major, as few vectors that belong together; at least one.

    Args:
        tensors: at least one, of one dtype.
        others: of the same shapes.
    """
    grouped = _Grouped(tensors, [None] * len(tensors), None)
    for group in grouped.groups:
        yield grouped.joined(group, tensors), grouped.joined(group, others)
    if not grouped.groups:
        yield tensors[0].reshape(-1), others[0].reshape(-1)


@torch.no_grad()
def select(tensors: Sequence[Tensor], subsets: Sequence[Subset], limit: int | None = None) -> list[Tensor]:
    """Copies of the elements of each tensor that its subset has, in row-major order: of shape (its count,).

    Those of one dtype lie in one memory, one after the other.

    Args:
        tensors: any.
        subsets: of each.
        limit: elements of a group, a multiple of 8; None: `LIMIT`.
    """
    values = [tensors[0]] * len(tensors)
    for places in by_kind([t.dtype for t in tensors]).values():
        same = [tensors[i] for i in places]
        grouped = _Grouped(same, [subsets[i] for i in places], limit)
        memory = same[0].new_empty(sum(grouped.counts))
        for group in grouped.groups:
            torch.index_select(grouped.joined(group, same), 0, grouped.indices(group), out=memory[group.values])
        for i, found in zip(places, memory.split(grouped.counts), strict=True):
            values[i] = found
    return values


@torch.no_grad()
def scatter_(
    tensors: Sequence[Tensor], subsets: Sequence[Subset], values: Sequence[Tensor], limit: int | None = None
) -> None:
    """Write values to the elements of each tensor that its subset has.

    Args:
        tensors: any.
        subsets: of each.
        values: of each, of its dtype and of shape (its count,).
        limit: as of `select`.
    """
    for places in by_kind([t.dtype for t in tensors]).values():
        same, theirs = [tensors[i] for i in places], [values[i] for i in places]
        grouped = _Grouped(same, [subsets[i] for i in places], limit)
        for group in grouped.groups:
            grouped.put(group, _values(group, theirs))


@torch.no_grad()
def norms(tensors: Sequence[Tensor], subsets: Sequence[Subset], limit: int | None = None) -> list[Tensor]:
    """The 2-norm of the elements of each tensor that its subset has, each of shape (), as of `foreach_norm`.

    Args:
        tensors: of floating dtypes.
        subsets: of each.
        limit: as of `select`.
    """
    of_pieces: list[list[Tensor]] = [[] for _ in tensors]
    for places in by_kind([t.dtype for t in tensors]).values():
        same = [tensors[i] for i in places]
        grouped = _Grouped(same, [subsets[i] for i in places], limit)
        for group in grouped.groups:
            found = grouped.joined(group, same).index_select(0, grouped.indices(group))
            each = foreach_norm(found.split([p.count for p in group.pieces]))
            for piece, norm in zip(group.pieces, each, strict=True):
                of_pieces[places[piece.index]].append(norm)
    return [_norm(found, tensors[0].device) for found in of_pieces]


def _norm(of_pieces: Sequence[Tensor], device: torch.device) -> Tensor:
    """Of a tensor by its pieces."""
    if len(of_pieces) == 1:
        return of_pieces[0]
    return torch.stack(list(of_pieces)).norm() if of_pieces else torch.zeros((), device=device)


def foreach_norm(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The 2-norm of each tensor: float32, of a float64 one float64, each of shape ().

    Those of one dtype together, which others would hinder.
    """
    norms = list(tensors)
    for dtype, places in by_kind([t.dtype for t in tensors]).items():
        wide = torch.promote_types(dtype, torch.float32)
        found = torch._foreach_norm([tensors[i] for i in places], 2, dtype=wide)
        for i, norm in zip(places, found, strict=True):
            norms[i] = norm
    return norms


@torch.no_grad()
def add_(
    tensors: Sequence[Tensor],
    subsets: Sequence[Subset | None],
    values: Sequence[Tensor],
    *,
    alpha: Tensor | None = None,
    factors: Sequence[float] | None = None,
    when: Tensor | None = None,
    backup: Backup | None = None,
    limit: int | None = None,
) -> None:
    """Add to the elements of each tensor that its subset has: computed in the more precise dtype, at least float32.

    Args:
        tensors: of floating dtypes.
        subsets: of each; None: all of it.
        values: of each, of shape (its count,); or as many as the tensor has elements, of which the subset's are added.
        alpha: what values are multiplied by first, of shape (); None: 1.
        factors: of each tensor, what α, if there is one, is multiplied by; None: 1.
        when: bool of shape (): if False, nothing is added.
        backup: keeps the elements as they were; None: nothing does.
        limit: as of `select`.
    """
    wholes = [s is None or v.numel() == t.numel() for t, s, v in zip(tensors, subsets, values, strict=True)]
    scale = _Scale(alpha, factors)
    kinds = [
        (t.dtype, v.dtype, s is None, whole) for t, s, v, whole in zip(tensors, subsets, values, wholes, strict=True)
    ]
    for places in by_kind(kinds).values():
        same, theirs = [tensors[i] for i in places], [values[i] for i in places]
        grouped = _Grouped(same, [subsets[i] for i in places], limit)
        everything, whole = subsets[places[0]] is None, wholes[places[0]]
        for group in grouped.groups:
            vector = grouped.joined(group, same)
            indices = None if everything else grouped.indices(group)
            old = vector if indices is None else vector.index_select(0, indices)
            if backup is not None:
                kept = old.clone() if everything and grouped.in_place(group) else old
                backup.keep(partial(grouped.put, group, kept))
            summand = grouped.joined(group, theirs) if whole else _values(group, theirs)
            if indices is not None and whole:
                summand = summand.index_select(0, indices)
            summand = summand.to(torch.promote_types(torch.promote_types(old.dtype, summand.dtype), torch.float32))
            new = old + scale(summand, [(places[p.index], p.count) for p in group.pieces])
            if when is not None:
                new = torch.where(when, new, old)
            new = new.to(vector.dtype)
            if indices is None:
                grouped.write(group, new)
                continue
            vector.index_copy_(0, indices, new)
            if not grouped.in_place(group):
                grouped.write(group, vector)


def _values(group: _Group, values: Sequence[Tensor]) -> Tensor:
    """Those of a group, of values of each tensor's."""
    parts = [values[p.index][p.first : p.first + p.count] for p in group.pieces]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class _Scale:
    """Multiplies the values of groups by α and each tensor's factor."""

    def __init__(self, alpha: Tensor | None, factors: Sequence[float] | None) -> None:
        self._alpha, self._factors = alpha, factors
        self._known: dict[float, Tensor] = {}

    def __call__(self, values: Tensor, pieces: Sequence[tuple[int, int]]) -> Tensor:
        """The product, in other memory.

        Args:
            values: of a group.
            pieces: of each of its pieces, the tensor and how many of the values are its.
        """
        if self._alpha is None:
            return values
        factors = [1.0 if self._factors is None else self._factors[tensor] for tensor, _ in pieces]
        if len(set(factors)) > 1:
            result = values * self._alpha
            torch._foreach_mul_(result.split([count for _, count in pieces]), factors)
            return result
        if factors[0] not in self._known:
            self._known[factors[0]] = self._alpha * factors[0]
        return values * self._known[factors[0]]

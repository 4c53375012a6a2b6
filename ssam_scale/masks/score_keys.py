"""Counting and masking by the sort keys of local scores, streamed: what a radix select needs of a shard.

CPU memory is read by compiled loops, and other devices by torch operations on one chunk after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ssam_scale.native import CHUNK, addresses, in_threads

_LOWEST = -(2**31)


class Keys(Protocol):
    """The keys of local scores: int32 in the order of the scores, of which some tensors make one segment."""

    def count(self, prefixes: Any | None, shift: int, width: int) -> Tensor:
        """How often each digit occurs.

        Args:
            prefixes: NumPy int64 [segments], the bits above the digit, which keys that are counted
                have; None for the highest digit.
            shift: place of the digit's lowest bit.
            width: its bits; the highest digit is counted from the lowest, which is negative, on.

        Returns:
            int64 [segments, 2^width], on the scores' device.
        """

    def equal(self, thresholds: Any) -> Tensor:
        """int64 [tensors], on the scores' device: how many keys equal the threshold of their segment.

        Args:
            thresholds: NumPy int64 [segments].
        """

    def mask(self, thresholds: Any, ties: Sequence[int] | None) -> list[Tensor]:
        """Packed masks of what lies above its segment's threshold.

        Args:
            thresholds: NumPy int64 [segments].
            ties: how many of each tensor's keys that equal the threshold are in the mask too, the first ones; None
                for all. `equal` was called before.
        """


def flat(scores: Sequence[Tensor]) -> list[Tensor]:
    """Each of the float32 `scores` as one contiguous row; copied only where it is not that already.

    Raises:
        TypeError: they are not float32.
    """
    for s in scores:
        if s.dtype != torch.float32:
            raise TypeError(f"scores are {s.dtype}; torch.float32 is needed")
    return [s.detach().reshape(-1).contiguous() for s in scores]


class CompiledKeys:
    """Of scores in CPU memory. The arguments are those of `keys_of`."""

    def __init__(
        self, scores: Sequence[Tensor], segments: Sequence[int], count: int, candidates: Sequence[Tensor] | None
    ) -> None:
        from .kernels import select  # numba takes a while to import, and not everybody selects

        self._select = select
        self._scores = flat(scores)  # kept: only their addresses are passed on
        self._candidates = None if candidates is None else [c.contiguous() for c in candidates]
        # In the order of the segments: a thread counts into rows of its own, and only of the segments that it meets.
        tasks = [
            (t, start, min(start + CHUNK, self._scores[t].numel()))
            for t in sorted(range(len(scores)), key=segments.__getitem__)
            for start in range(0, self._scores[t].numel(), CHUNK)
        ]
        self._tasks = np.array(tasks, np.int64).reshape(-1, 3)
        self._segments = np.array(segments, np.int64)
        self._count = count
        live = np.zeros(len(scores), np.int64) if self._candidates is None else addresses(self._candidates)
        self._where = addresses(self._scores), live
        self._equal = np.zeros(len(tasks), np.int64)

    def count(self, prefixes: Any | None, shift: int, width: int) -> Tensor:
        """See `Keys`."""
        counts = np.zeros((self._count, 2**width), np.int64)
        given = np.zeros(0, np.int64) if prefixes is None else prefixes
        parts: list[tuple[int, Any]] = []

        def work(part: slice) -> None:
            tasks = self._tasks[part]
            if not len(tasks):
                return
            first, last = (int(self._segments[tasks[n, 0]]) for n in (0, -1))
            own = np.zeros((last - first + 1, 2**width), np.int64)
            self._select.count_digits(*self._where, tasks, self._segments, first, given, shift, width, own)
            parts.append((first, own))

        in_threads(work, self._tasks)
        for first, own in parts:
            counts[first : first + len(own)] += own
        return torch.from_numpy(counts)

    def equal(self, thresholds: Any) -> Tensor:
        """See `Keys`."""
        keys = thresholds.astype(np.int32)

        def work(part: slice) -> None:
            self._select.count_equal(*self._where, self._tasks[part], self._segments, keys, self._equal[part])

        in_threads(work, self._tasks)
        counts = np.zeros(len(self._scores), np.int64)
        np.add.at(counts, self._tasks[:, 0], self._equal)
        return torch.from_numpy(counts)

    def mask(self, thresholds: Any, ties: Sequence[int] | None) -> list[Tensor]:
        """See `Keys`."""
        keys = thresholds.astype(np.int32)
        masks = [torch.empty((s.numel() + 7) // 8, dtype=torch.uint8) for s in self._scores]
        out = addresses(masks)
        if ties is None:
            equal = taking = np.ones(len(self._tasks), np.int64)
        else:
            # The tasks of one tensor stand together, in the order of its elements.
            equal, tensors = self._equal, self._tasks[:, 0]
            before = equal.cumsum() - equal
            before -= np.maximum.accumulate(np.where(np.diff(tensors, prepend=-1) != 0, before, 0))
            taking = np.clip(np.array(ties, np.int64)[tensors] - before, 0, equal)

        def work(part: slice) -> None:
            self._select.write_bits(
                *self._where, self._tasks[part], self._segments, keys, equal[part], taking[part], out
            )

        in_threads(work, self._tasks)
        return masks


class ChunkedKeys:
    """Of scores on any device, by torch operations. The arguments are those of `keys_of`."""

    def __init__(
        self, scores: Sequence[Tensor], segments: Sequence[int], count: int, candidates: Sequence[Tensor] | None
    ) -> None:
        self._scores, self._segments, self._count = flat(scores), list(segments), count
        self._candidates = candidates
        self._device = scores[0].device
        self._places = torch.arange(8, dtype=torch.uint8, device=self._device)

    def _keys(self, tensor: int, start: int) -> Tensor:
        bits = self._scores[tensor][start : start + CHUNK].view(torch.int32)
        return torch.where(bits >= 0, bits, _LOWEST - bits)

    def _live(self, tensor: int, start: int, found: Tensor) -> Tensor:
        """Those of `found`, booleans of a chunk, that are candidates."""
        if self._candidates is None:
            return found
        part = self._candidates[tensor][start // 8 : (start + CHUNK) // 8]
        return found & ((part.unsqueeze(1) >> self._places) & 1).bool().reshape(-1)[: len(found)]

    def count(self, prefixes: Any | None, shift: int, width: int) -> Tensor:
        """See `Keys`."""
        counts = torch.zeros(self._count, 2**width + 1, dtype=torch.int64, device=self._device)
        for t, (scores, segment) in enumerate(zip(self._scores, self._segments, strict=True)):
            for start in range(0, scores.numel(), CHUNK):
                keys = self._keys(t, start)
                if prefixes is None:
                    inside, digits = torch.ones_like(keys, dtype=torch.bool), (keys >> shift) + 2 ** (width - 1)
                else:
                    inside = (keys >> (shift + width)) == int(prefixes[segment])
                    digits = (keys >> shift) & (2**width - 1)
                # What is not counted goes to a place of its own: picking the rest would wait for their number.
                digits = torch.where(self._live(t, start, inside), digits, 2**width)
                counts[segment] += torch.bincount(digits, minlength=2**width + 1)
        return counts[:, :-1].contiguous()

    def equal(self, thresholds: Any) -> Tensor:
        """See `Keys`."""
        counts = torch.zeros(len(self._scores), dtype=torch.int64, device=self._device)
        for t, (scores, segment) in enumerate(zip(self._scores, self._segments, strict=True)):
            for start in range(0, scores.numel(), CHUNK):
                counts[t] += self._live(t, start, self._keys(t, start) == int(thresholds[segment])).sum()
        return counts

    def mask(self, thresholds: Any, ties: Sequence[int] | None) -> list[Tensor]:
        """See `Keys`."""
        masks = []
        for t, (scores, segment) in enumerate(zip(self._scores, self._segments, strict=True)):
            threshold = int(thresholds[segment])
            packed = torch.zeros((scores.numel() + 7) // 8, dtype=torch.uint8, device=self._device)
            left = None if ties is None else torch.tensor(ties[t], device=self._device)
            for start in range(0, scores.numel(), CHUNK):
                key = self._keys(t, start)
                chosen = self._live(t, start, key >= threshold if left is None else key > threshold)
                if left is not None:
                    tie = self._live(t, start, key == threshold)
                    chosen |= tie & (tie.cumsum(0) <= left)
                    left = left - tie.sum()
                padded = torch.nn.functional.pad(chosen.byte(), (0, -len(chosen) % 8))
                sums = (padded.view(-1, 8) << self._places).sum(1, dtype=torch.uint8)
                packed[start // 8 : start // 8 + len(sums)] = sums
            masks.append(packed)
        return masks


def keys_of(scores: Sequence[Tensor], segments: Sequence[int], count: int, candidates: Sequence[Tensor] | None) -> Keys:
    """The keys of `scores`, at least one tensor, all on one device.

    Args:
        scores: float32, any shape.
        segments: the segment of each, below `count`.
        count: number of segments.
        candidates: packed masks of the elements that take part; None for all.
    """
    kind = CompiledKeys if scores[0].device.type == "cpu" else ChunkedKeys
    return kind(scores, segments, count, candidates)

"""Weights that every process holds and one process each has written to: sending what was written, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from .interface import Elements


@dataclass(frozen=True)
class PackedParameter:
    """One parameter whose elements several processes have written to.

    Attributes:
        whole: all of it, flat, on this process.
        runs: (process, start, length) of the runs of elements that belong to one process each, in their order.
        written: which elements of all were written to; None: all of them.
        own: which elements of this process's run; None: all of them.
    """

    whole: Tensor
    runs: Sequence[tuple[int, int, int]]
    written: Elements | None
    own: Elements | None


class RunCounts:
    """How many elements of each run are wanted. Counting makes the host wait for the device: once for each mask."""

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[Elements, list[int]] = WeakKeyDictionary()

    def __call__(self, wanted: Elements | None, runs: Sequence[tuple[int, int, int]]) -> list[int]:
        """The numbers.

        Args:
            wanted: elements of one parameter, always the same one; None: all of them.
            runs: (process, start, length) of runs of it.
        """
        if wanted is None:
            return [length for _, _, length in runs]
        if (known := self._known.get(wanted)) is None:
            flags = wanted.booleans()
            known = self._known[wanted] = [int(flags[start : start + length].sum()) for _, start, length in runs]
        return known


class Packing:
    """Exchanges what was written to between all processes."""

    def __init__(self) -> None:
        self._counts = RunCounts()

    def exchange(self, spreads: Sequence[PackedParameter]) -> None:
        """Every process's elements of `spreads`, all of one dtype, become what they are on their own. Collective."""
        rank, size = dist.get_rank(), dist.get_world_size()
        counts = [self._counts(spread.written, spread.runs) for spread in spreads]
        of_process = [0] * size
        for spread, numbers in zip(spreads, counts, strict=True):
            for (process, _, _), number in zip(spread.runs, numbers, strict=True):
                of_process[process] += number
        if not any(of_process):
            return
        # A process passes on, in an all-gather, as much of each of the others as there is of the one that has most; in
        # a broadcast by each, what there is.
        even = max(of_process) * (size - 1) <= sum(of_process)
        widths = [max(of_process)] * size if even else of_process
        received = list(spreads[0].whole.new_empty(sum(widths)).split(widths))
        if own := [piece for spread in spreads for piece in _own(spread, rank)]:
            torch.cat(own, out=received[rank][: of_process[rank]])
        if even:
            whole = received[0]._base
            assert whole is not None
            dist.all_gather_single(whole, received[rank])
        else:
            sending = [
                dist.broadcast(piece, src=process, async_op=True)
                for process, piece in enumerate(received)
                if len(piece)
            ]
            for work in sending:
                work.wait()
        _put(spreads, counts, received)


def _own(spread: PackedParameter, rank: int) -> list[Tensor]:
    runs = [spread.whole[start : start + length] for process, start, length in spread.runs if process == rank]
    return [run if spread.written is None or spread.own is None else spread.own.take(run) for run in runs]


def _put(spreads: Sequence[PackedParameter], counts: Sequence[Sequence[int]], received: Sequence[Tensor]) -> None:
    taken = [0] * len(received)
    targets, sources = [], []
    for spread, numbers in zip(spreads, counts, strict=True):
        pieces = []
        for (process, start, length), number in zip(spread.runs, numbers, strict=True):
            pieces.append(received[process][taken[process] : taken[process] + number])
            taken[process] += number
            if spread.written is None:
                targets.append(spread.whole[start : start + length])
        if spread.written is None:
            sources += pieces
        else:
            spread.written.put(spread.whole, torch.cat(pieces))
    if targets:
        torch._foreach_copy_(targets, sources)

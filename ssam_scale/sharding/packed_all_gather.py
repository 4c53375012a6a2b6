"""All-gather of the written elements only, of weights that every rank holds and one rank each writes to (ZeRO 1, 2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from ssam_scale.torch_compat import all_gather_single

from .interface import Elements

Run: TypeAlias = tuple[int, int, int]
"""(rank, start, length) of consecutive elements of a flattened parameter that one rank owns."""


class RunCounts:
    """How many of a mask's elements lie in each run. Counting makes the host wait for the device: once a mask."""

    def __init__(self) -> None:
        self._counts: WeakKeyDictionary[Elements, list[int]] = WeakKeyDictionary()

    def __call__(self, elements: Elements | None, runs: Sequence[Run]) -> list[int]:
        """The numbers.

        Args:
            elements: of one parameter, which always has the same runs; None: all of them.
            runs: of it.
        """
        if elements is None:
            return [length for _, _, length in runs]
        if (known := self._counts.get(elements)) is None:
            flags = elements.booleans()
            sums = [flags[start : start + length].sum() for _, start, length in runs]
            known = self._counts[elements] = torch.stack(sums).tolist()
        return known


@dataclass(frozen=True)
class WrittenParameter:
    """One parameter, each run of which its owner may have written to.

    Attributes:
        full: all of it, flat, on this rank.
        runs: which rank owns which elements, in the order of ranks.
        written: which elements of all were written to; None: all of them.
        own: which elements of this rank's run; None: all of them.
    """

    full: Tensor
    runs: Sequence[Run]
    written: Elements | None
    own: Elements | None


class PackedAllGather:
    """Gathers what every rank has written to, without what it has not."""

    def __init__(self) -> None:
        self._counts = RunCounts()

    def __call__(self, parameters: Sequence[WrittenParameter]) -> None:
        """Every element of `parameters`, all of one dtype, becomes what it is on its owner. Collective."""
        rank, size = dist.get_rank(), dist.get_world_size()
        counts = [self._counts(p.written, p.runs) for p in parameters]
        of_rank = [0] * size
        for p, numbers in zip(parameters, counts, strict=True):
            for (owner, _, _), number in zip(p.runs, numbers, strict=True):
                of_rank[owner] += number
        if not any(of_rank):
            return
        # An all-gather sends from each rank as much as from the one that has most; a broadcast by each, what there is.
        even = max(of_rank) * (size - 1) <= sum(of_rank)
        widths = [max(of_rank)] * size if even else of_rank
        received = list(parameters[0].full.new_empty(sum(widths)).split(widths))
        if own := [piece for p in parameters for piece in _own(p, rank)]:
            torch.cat(own, out=received[rank][: of_rank[rank]])
        if even:
            buffer = received[0]._base
            assert buffer is not None
            all_gather_single(buffer, received[rank])
        elif dist.get_backend() == "nccl":  # which makes one launch of all broadcasts; gloo gathers equal pieces alone
            dist.all_gather(received, received[rank])
        else:
            works = [dist.broadcast(piece, src=r, async_op=True) for r, piece in enumerate(received) if len(piece)]
            for work in works:
                work.wait()
        _unpack(parameters, counts, received)


def _own(p: WrittenParameter, rank: int) -> list[Tensor]:
    runs = [p.full[start : start + length] for owner, start, length in p.runs if owner == rank]
    return [run if p.written is None or p.own is None else p.own.take(run) for run in runs]


def _unpack(
    parameters: Sequence[WrittenParameter], counts: Sequence[Sequence[int]], received: Sequence[Tensor]
) -> None:
    offsets = [0] * len(received)
    targets, sources = [], []
    for p, numbers in zip(parameters, counts, strict=True):
        pieces = []
        for (owner, start, length), number in zip(p.runs, numbers, strict=True):
            pieces.append(received[owner][offsets[owner] : offsets[owner] + number])
            offsets[owner] += number
            if p.written is None:
                targets.append(p.full[start : start + length])
        if p.written is None:
            sources += pieces
        else:
            p.written.put(p.full, torch.cat(pieces))
    if targets:
        torch._foreach_copy_(targets, sources)

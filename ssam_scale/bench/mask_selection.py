"""Choosing masks: exact distributed selection next to concatenating all scores and calling `torch.topk`.

Scores look like a ViT-B's Fisher scores: squares of normals, times a scale of each tensor that spans five decades. In
`top_k, 60% zeros` the threshold is 0 and falls among equal scores. Every process holds its part of the same scores:
each tensor is sharded into equal runs.

The alternative on several processes gathers all scores to each, selects there, and keeps its own part of the mask.
`torch.topk` returns sorted scores unless it is told not to; both are measured.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ssam_scale.clock import timed
from ssam_scale.masks.selection import top_k, unit_means

from .peak_memory import extra_bytes
from .processes import on_ranks

_SEED = 0
_ZEROS = {"top_k": 0.0, "top_k, 60% zeros": 0.6}

# Weights of the tensors of a ViT-B/16.
_BLOCK = [768, 768, 3 * 768 * 768, 3 * 768, 768 * 768, 768, 768, 768, 4 * 768 * 768, 4 * 768, 4 * 768 * 768, 768]
_VIT_B = [768, 197 * 768, 768 * 768, 768, *(12 * _BLOCK), 768, 768, 1000 * 768, 1000]


def tensor_sizes(total: int) -> tuple[list[int], int]:
    """Sizes of tensors like a ViT-B's that have `total` elements together, and of the rows that most consist of."""
    row = 768 if total >= 2**20 else 8
    edges = [0, *(done * total // sum(_VIT_B) // row * row for done in accumulate(_VIT_B[:-1])), total]
    return [after - before for before, after in pairwise(edges)], row


def _all_scores(total: int, zeros: float) -> Iterator[Tensor]:
    """The scores of all processes, tensor by tensor: float32 [numel] in CPU memory."""
    generator = torch.Generator().manual_seed(_SEED)
    for numel in tensor_sizes(total)[0]:
        scale = 10.0 ** (-6.0 + 5.0 * float(torch.rand((), generator=generator)))
        scores = torch.randn(numel, generator=generator).square_().mul_(scale)
        if zeros:
            scores[torch.rand(numel, generator=generator) < zeros] = 0.0
        yield scores


def _shard(numel: int, rank: int, size: int) -> tuple[int, int]:
    """Start and end of a process's shard of a tensor."""
    each = -(-numel // size)
    return min(rank * each, numel), min((rank + 1) * each, numel)


class _CountingGroup:
    """The process group of all processes, which counts the bytes that each gives to collectives."""

    def __init__(self, rank: int, size: int) -> None:
        self.size, self.rank = size, rank
        self.sent = 0

    def all_reduce(self, tensor: Tensor) -> Tensor:
        if self.size > 1:
            self.sent += tensor.numel() * tensor.element_size()
            dist.all_reduce(tensor)
        return tensor

    def gather(self, local: Tensor, longest: int) -> Tensor:
        """The rows of all processes, padded to the longest, one after the other."""
        if self.size == 1:
            return local
        on = torch.device("cpu") if dist.get_backend() == "gloo" else local.device
        padded = torch.full((longest,), -math.inf, device=on)
        padded[: len(local)] = local
        self.sent += padded.numel() * padded.element_size()
        rows = torch.empty(self.size * longest, device=on)
        dist.all_gather(list(rows.split(longest)), padded)
        return rows.to(local.device)


def _by_topk(local: Sequence[Tensor], k: int, group: _CountingGroup, longest: int, ordered: bool) -> list[Tensor]:
    """All-gather and `torch.topk`: boolean masks of this process's shard."""
    scores = group.gather(torch.cat(list(local)), longest)
    chosen = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    chosen[torch.topk(scores, k, sorted=ordered).indices] = True
    start = group.rank * longest
    lengths = [len(part) for part in local]
    return [mask.clone() for mask in chosen[start : start + sum(lengths)].split(lengths)]


def _by_definition(total: int, zeros: float, k: int, rank: int, size: int) -> list[Tensor]:
    """Packed masks of this process's shard: what lies above the k-th highest score, and the first that equal it."""
    tensors = list(_all_scores(total, zeros))
    flat = torch.cat(tensors)
    if k == 0:
        chosen = torch.zeros(total, dtype=torch.bool)
    else:
        threshold = torch.kthvalue(flat, total - k + 1).values
        chosen = flat > threshold
        ties = torch.nonzero(flat == threshold).squeeze(1)
        chosen[ties[: k - int(chosen.sum())]] = True
    masks = []
    for mask in chosen.split([len(t) for t in tensors]):
        start, end = _shard(len(mask), rank, size)
        part = torch.nn.functional.pad(mask[start:end].byte(), (0, (start - end) % 8)).view(-1, 8)
        masks.append((part << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8))
    return masks


def _seconds(work: Callable[[], Any], device: torch.device, size: int) -> float:
    """How long `work` takes until the last process has done it."""
    if size > 1:
        dist.barrier()
    with timed(device) as call:
        work()
    took = torch.tensor(call.seconds, dtype=torch.float64, device=device)
    if size > 1:
        dist.all_reduce(took, op=dist.ReduceOp.MAX)
    return float(took)


def _all(fact: bool, device: torch.device, size: int) -> bool:
    wrong = torch.tensor(int(not fact), device=device)
    if size > 1:
        dist.all_reduce(wrong)
    return not int(wrong)


def _measure(rank: int, size: int, device: torch.device, total: int, repeats: int, means: bool) -> list[dict[str, Any]]:
    """The rows of one number of processes, on each of them."""
    common = {
        "scores": total,
        "ranks": size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "repeats": repeats,
    }
    rows = []
    k = total // 2
    longest = max(
        sum(end - start for start, end in (_shard(n, r, size) for n in tensor_sizes(total)[0])) for r in range(size)
    )
    for what, zeros in _ZEROS.items():
        local = [s[slice(*_shard(len(s), rank, size))].clone().to(device) for s in _all_scores(total, zeros)]
        weights = max(sum(len(s) for s in local), 1)
        ours, plain = _CountingGroup(rank, size), _CountingGroup(rank, size)
        small = [torch.arange(100.0, device=device) // 10]
        top_k(small, [55], _CountingGroup(0, 1))  # compiled, if need be, what ties need included
        _by_topk(small, 55, _CountingGroup(0, 1), 100, True)
        select = partial(top_k, local, [k], ours)
        by_topk, by_unsorted = (partial(_by_topk, local, k, plain, longest, ordered) for ordered in (True, False))
        extra = extra_bytes(select, device)
        sent = ours.sent
        plain_extra = extra_bytes(by_topk, device)
        plain_sent = plain.sent
        times = [[_seconds(work, device, size) for work in (select, by_topk, by_unsorted)] for _ in range(repeats)]
        seconds, topk, unsorted = (statistics.median(column) for column in zip(*times, strict=True))
        expected = _by_definition(total, zeros, k, rank, size)
        exact = all(torch.equal(mine.cpu(), e) for mine, e in zip(select(), expected, strict=True))
        rows.append(
            {
                "what": what,
                **common,
                "k": k,
                "exact": _all(exact, device, size),
                "seconds": seconds,
                "topk_seconds": topk,
                "topk_time_over_ours": topk / seconds,
                "unsorted_topk_seconds": unsorted,
                "unsorted_topk_time_over_ours": unsorted / seconds,
                "extra_bytes_per_weight": None if extra is None else extra / weights,
                "topk_extra_bytes_per_weight": None if plain_extra is None else plain_extra / weights,
                "collective_bytes": sent,
                "topk_collective_bytes": plain_sent,
            }
        )
    if means:
        rows.append({"what": "unit_means", **common, **_measure_means(rank, size, device, total, repeats)})
    return rows


def _measure_means(rank: int, size: int, device: torch.device, total: int, repeats: int) -> dict[str, Any]:
    """Means of rows, next to those that one process has, bit for bit, and next to means in float64."""
    numels, row = tensor_sizes(total)
    sizes = [row if numel % row == 0 else numel for numel in numels]
    whole = list(_all_scores(total, 0.0))
    runs = [_shard(numel, rank, size) for numel in numels]
    local = [s[slice(*run)].clone().to(device) for s, run in zip(whole, runs, strict=True)]
    group = _CountingGroup(rank, size)

    def means() -> list[Tensor]:
        return unit_means(local, [start for start, _ in runs], numels, sizes, group)

    unit_means([torch.ones(8, device=device)], [0], [8], [8], _CountingGroup(0, 1))  # compiled, if need be
    extra = extra_bytes(means, device)
    sent = group.sent
    seconds = statistics.median(_seconds(means, device, size) for _ in range(repeats))
    alone = unit_means(whole, [0] * len(whole), numels, sizes, _CountingGroup(0, 1))
    exact = all(
        torch.equal(mine, a) and torch.allclose(a, s.view(-1, max(width, 1)).double().mean(1), rtol=1e-9, atol=0.0)
        for mine, a, s, width in zip(means(), alone, whole, sizes, strict=True)
    )
    return {
        "exact": _all(exact, device, size),
        "seconds": seconds,
        "extra_bytes_per_weight": None if extra is None else extra / max(sum(len(s) for s in local), 1),
        "collective_bytes": sent,
    }


def bench_masks(scores: int, ranks: Sequence[int], repeats: int, means: bool = False) -> list[dict[str, Any]]:
    """Rows of what choosing half of `scores` costs, for each number of processes in `ranks`.

    With `means` also the means over rows that coarser masks are chosen by, which have no `torch.topk` beside them.

    Times are medians of `repeats`, taken in turns with the alternative, each until the slowest process is done. Memory
    is what one call takes at its peak beyond the scores, masks included, per local weight, on the first process
    (`peak_memory.extra_bytes` tells how it is measured), and is asked for before anything was selected at that size.
    `collective_bytes` are what each process gives to collectives. `exact`: on every process the mask is that of the
    definition, by `torch.kthvalue` over all scores and by position among equal ones.

    Raises:
        UserError: the memory does not suffice.
    """
    return [row for size in ranks for row in on_ranks(size, _measure, scores, repeats, means)]

"""Exact selection of the highest scores over sharded tensors, without gathering them: elements, and whole units."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssam_scale.native import CHUNK, addresses, in_threads

from .score_keys import flat, keys_of
from .shard_group import ShardGroup

# The digits of a 32-bit key as (shift, width), the highest first. Many segments have small histograms, which are summed
# over the processes; a single one rather has few.
_FEW_SEGMENTS = 32
_LONG = ((21, 11), (10, 11), (0, 10))
_SHORT = ((24, 8), (16, 8), (8, 8), (0, 8))


def top_k(
    scores: Sequence[Tensor],
    k: Sequence[int],
    group: ShardGroup,
    *,
    segments: Sequence[int] | None = None,
    candidates: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Packed masks of the highest scores of every segment, over all processes: a radix select over the floats' bits.

    Three or four histograms are summed over the shards, and numbers of equal scores if not all of them are chosen; no
    score leaves its process. Equal scores (0.0 and -0.0 are) go to the lower global position, tensor by tensor and
    row-major within one, so the masks do not depend on how the scores are spread. Beside the masks it takes memory for
    chunks and histograms only. Collective.

    Args:
        scores: local float32 scores of each tensor, any shape, without NaN; the same tensors in the same order on every
            process, on one device. Shards of one tensor lie in the order of `group.rank`.
        k: how many to choose of each segment.
        group: the processes that the scores are sharded over.
        segments: the segment that each tensor belongs to; all to the first by default.
        candidates: of each tensor, a packed mask of the elements that may be chosen; all by default.

    Returns:
        Of each tensor uint8 [⌈local numel / 8⌉] on the scores' device: bit j of byte i tells whether the flattened
        local element 8·i + j is chosen; unused bits are 0. Over all processes k[s] bits of segment s are set.

    Raises:
        TypeError: scores are not float32.
        ValueError: a segment has less than k[s] candidates, or k[s] is negative; on every process alike.
    """
    where = [0] * len(scores) if segments is None else list(segments)
    if not scores:
        _check_budgets(k, [0] * len(k))
        return []
    keys = keys_of(scores, where, len(k), candidates)
    prefixes: Any = None
    remaining = np.array(k, np.int64).reshape(-1, 1)
    for shift, width in _LONG if len(k) <= _FEW_SEGMENTS else _SHORT:
        # On the host: the steps down to the threshold are too small for a device, or for several threads.
        counts = group.all_reduce(keys.count(prefixes, shift, width)).cpu().numpy()[:, ::-1]
        if prefixes is None:
            _check_budgets(k, counts.sum(1).tolist())
        above = counts.cumsum(1)
        # Where nothing is to be chosen this is the highest digit each time, and ends at a key that no score has.
        from_top = (above < remaining).sum(1, keepdims=True)
        equal = np.take_along_axis(counts, from_top, 1)
        remaining = remaining - np.take_along_axis(above, from_top, 1) + equal
        digit = 2**width - 1 - from_top[:, 0]
        prefixes = digit - 2 ** (width - 1) if prefixes is None else (prefixes << width) + digit
    if (remaining == equal).all():
        return keys.mask(prefixes, None)
    selected = _ties_selected(keys.equal(prefixes), remaining[:, 0].tolist(), where, group)
    return keys.mask(prefixes, selected)


def _check_budgets(k: Sequence[int], candidates: Sequence[int]) -> None:
    for segment, (wanted, available) in enumerate(zip(k, candidates, strict=True)):
        if not 0 <= wanted <= available:
            which = f" of segment {segment}" if len(k) > 1 else ""
            raise ValueError(f"k{which} is {wanted}; 0 to {available} can be chosen")


def _ties_selected(ties: Tensor, remaining: list[int], where: list[int], group: ShardGroup) -> list[int]:
    """How many of this process's scores that equal the threshold are chosen, of each tensor.

    Args:
        ties: int64 [tensors], how many there are of each tensor.
        remaining: how many of each segment are to be chosen over all processes.
        where: the segment of each tensor.
        group: the processes that the scores are sharded over.
    """
    each = ties.new_zeros(group.size, len(ties))
    each[group.rank] = ties
    each = group.all_reduce(each)
    everywhere, earlier = torch.stack([each.sum(0), each[: group.rank].sum(0)]).tolist()
    left, selected = list(remaining), []
    for segment, total, before, own in zip(where, everywhere, earlier, ties.tolist(), strict=True):
        selected.append(min(max(left[segment] - before, 0), own))
        left[segment] = max(left[segment] - total, 0)
    return selected


def greedy_units(means: Tensor, numels: Tensor, k: int) -> Tensor:
    """Whole units of the highest mean score that together hold at most `k` elements.

    Units are selected in the order of falling mean, of equal ones the earlier first; one that does not fit any more is
    passed over. So the density is that asked for, rounded down by less than the smallest unit left out.

    Args:
        means: [units], float64 in CPU memory.
        numels: int64 [units], elements of each.
        k: the budget in elements.

    Returns:
        bool [units], True for those that are selected.
    """
    order = torch.sort(means, descending=True, stable=True).indices
    selected, sizes = [], numels[order].tolist()
    for position, size in enumerate(sizes):
        if size <= k:
            selected.append(position)
            k -= size
    chosen = torch.zeros(len(means), dtype=torch.bool)
    chosen[order[selected]] = True
    return chosen


def unit_means(
    scores: Sequence[Tensor],
    starts: Sequence[int],
    numels: Sequence[int],
    sizes: Sequence[int],
    group: ShardGroup,
) -> list[Tensor]:
    """The mean score of every unit of consecutive elements of every tensor. Collective: two sums over the shards.

    Scores are added as integers, in which order does not matter: multiples of a power of two that is chosen for each
    tensor by its largest magnitude M and by the size of its units, such that no sum can overflow. So a mean is off by
    at most M · 2^(⌈log2 size⌉ − 62): 2e-16 M for units of 1,000 elements, 1.5e-11 M for one of 64 million.

    Args:
        scores: local float32 scores of each tensor, finite, any shape; the same tensors in the same order on every
            process, on one device.
        starts: position of the first local element in the flattened whole tensor, of each tensor.
        numels: elements of each whole tensor.
        sizes: elements of a unit of each tensor, which divide `numels`. A unit may lie on several processes.
        group: the processes that the scores are sharded over.

    Returns:
        Of each tensor all means, on every process: float64 [numel / size], in CPU memory.

    Raises:
        TypeError: scores are not float32.
        ValueError: a tensor is not made of whole units.
    """
    for numel, size in zip(numels, sizes, strict=True):
        if numel and (size <= 0 or numel % size):
            raise ValueError(f"a tensor of {numel} elements is not made of units of {size}")
    if not scores:
        return []
    local = flat(scores)
    scales = [_scale(m, size) for m, size in zip(_largest(local, group), sizes, strict=True)]
    units = [numel // size if numel else 0 for numel, size in zip(numels, sizes, strict=True)]
    sums = torch.zeros(sum(units), dtype=torch.int64, device=local[0].device)
    add = _add_compiled if sums.device.type == "cpu" else _add_chunked
    add(local, starts, sizes, scales, units, sums)
    exact = group.all_reduce(sums).cpu().double().split(units)
    return [e / (scale * size) for e, scale, size in zip(exact, scales, sizes, strict=True)]


def _largest(scores: Sequence[Tensor], group: ShardGroup) -> list[float]:
    """The largest magnitude of each tensor over all processes."""
    nothing = scores[0].new_zeros(())
    each = scores[0].new_zeros(group.size, len(scores))
    # The extremes are found without a copy of absolute values.
    extremes = [torch.stack(torch.aminmax(s)).abs().max() if s.numel() else nothing for s in scores]
    each[group.rank] = torch.stack(extremes)
    return group.all_reduce(each).amax(0).tolist()


def _scale(largest: float, size: int) -> float:
    """The power of two that takes magnitudes up to `largest` to integers of which `size` add up to at most 2^62."""
    return math.ldexp(1.0, 62 - (size - 1).bit_length() - math.frexp(largest)[1]) if largest else 1.0


def _firsts(units: Sequence[int]) -> list[int]:
    return [0, *accumulate(units)][:-1]


def _add_compiled(
    scores: Sequence[Tensor],
    starts: Sequence[int],
    sizes: Sequence[int],
    scales: Sequence[float],
    units: Sequence[int],
    sums: Tensor,
) -> None:
    from .kernels import select  # numba takes a while to import

    tasks = []
    for t, (score, start, size) in enumerate(zip(scores, starts, sizes, strict=True)):
        position = 0
        while position < score.numel():
            # Up to the end of a unit: two threads must not add to the same one.
            whole = max(CHUNK // size, 1) * size
            stop = min(score.numel(), (start + position) // size * size + whole - start)
            tasks.append((t, position, stop))
            position = stop
    table = np.array(tasks, np.int64).reshape(-1, 3)
    where = addresses(scores)
    rows = np.array(starts, np.int64), np.array(sizes, np.int64), np.array(scales), np.array(_firsts(units), np.int64)
    in_threads(lambda part: select.sum_units(where, table[part], *rows, sums.numpy()), table)


def _add_chunked(
    scores: Sequence[Tensor],
    starts: Sequence[int],
    sizes: Sequence[int],
    scales: Sequence[float],
    units: Sequence[int],
    sums: Tensor,
) -> None:
    for score, start, size, scale, first in zip(scores, starts, sizes, scales, _firsts(units), strict=True):
        position = 0
        while position < score.numel():
            unit, inside = divmod(start + position, size)
            left = score.numel() - position
            if inside or min(left, CHUNK) < size:  # a part of one unit
                length = min(left, CHUNK, size - inside)
                rows = 1
            else:
                rows = min(left, CHUNK) // size
                length = rows * size
            integers = (score[position : position + length].double() * scale).round_().long()
            sums[first + unit : first + unit + rows] += integers.view(rows, -1).sum(1)
            position += length

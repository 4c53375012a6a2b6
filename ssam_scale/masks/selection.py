"""Exact selection of the highest scores, spread over shards, without gathering them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .radix import Processes, keys_of
from .units import unit_means

__all__ = ["greedy_units", "top_k", "unit_means"]

# The digits of a 32-bit key as (shift, width), the highest first. Many segments have small histograms, which are summed
# over the processes; a single one rather has few.
_FEW_SEGMENTS = 32
_LONG = ((21, 11), (10, 11), (0, 10))
_SHORT = ((24, 8), (16, 8), (8, 8), (0, 8))


def top_k(
    scores: Sequence[Tensor],
    k: Sequence[int],
    sharding: Processes,
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
            process, on one device. Shards of one tensor lie in the order of `sharding.shard_index`.
        k: how many to choose of each segment.
        sharding: over whom the scores are spread.
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
        counts = sharding.sum_over_shards(keys.count(prefixes, shift, width)).cpu().numpy()[:, ::-1]
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
    taken = _share_ties(keys.equal(prefixes), remaining[:, 0].tolist(), where, sharding)
    return keys.mask(prefixes, taken)


def _check_budgets(k: Sequence[int], candidates: Sequence[int]) -> None:
    for segment, (wanted, available) in enumerate(zip(k, candidates, strict=True)):
        if not 0 <= wanted <= available:
            which = f" of segment {segment}" if len(k) > 1 else ""
            raise ValueError(f"k{which} is {wanted}; 0 to {available} can be chosen")


def _share_ties(ties: Tensor, remaining: list[int], where: list[int], sharding: Processes) -> list[int]:
    """How many of this process's scores at the threshold are chosen.

    Args:
        ties: int64 [tensors], how many there are of each tensor.
        remaining: how many of each segment are to be chosen over all processes.
        where: the segment of each tensor.
        sharding: over whom the scores are spread.
    """
    each = ties.new_zeros(sharding.shards_each, len(ties))
    each[sharding.shard_index] = ties
    each = sharding.sum_over_shards(each)
    everywhere, earlier = torch.stack([each.sum(0), each[: sharding.shard_index].sum(0)]).tolist()
    left, taken = list(remaining), []
    for segment, total, before, own in zip(where, everywhere, earlier, ties.tolist(), strict=True):
        taken.append(min(max(left[segment] - before, 0), own))
        left[segment] = max(left[segment] - total, 0)
    return taken


def greedy_units(means: Tensor, numels: Tensor, k: int) -> Tensor:
    """Whole units of the highest mean score that together hold at most `k` elements.

    Units are taken in the order of falling mean, of equal ones the earlier first; one that does not fit any more is
    passed over. So the density is that asked for, rounded down by less than the smallest unit left out.

    Args:
        means: [units], float64 in CPU memory.
        numels: int64 [units], elements of each.
        k: the budget in elements.

    Returns:
        bool [units], which are taken.
    """
    order = torch.sort(means, descending=True, stable=True).indices
    taken, sizes = [], numels[order].tolist()
    for position, size in enumerate(sizes):
        if size <= k:
            taken.append(position)
            k -= size
    chosen = torch.zeros(len(means), dtype=torch.bool)
    chosen[order[taken]] = True
    return chosen

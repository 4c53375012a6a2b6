"""Exact selection of the highest scores, spread over shards, without gathering them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ssam_scale.sharding import Sharding

_DIGITS = ((20, 12), (8, 12), (0, 8))  # (shift, width) of the digits of a 32-bit key, the highest first


def _keys(scores: Tensor) -> Tensor:
    """Keys in [0, 2³²), as int64, in the order of float32 `scores`; of negative floats the bits count downwards."""
    bits = (scores.float() + 0.0).view(torch.int32).to(torch.int64)  # + 0.0 makes -0.0 equal to 0.0
    return torch.where(bits >= 0, bits + 2**31, -1 - bits)


def _kth_largest(keys: Sequence[Tensor], k: int, add: Callable[[Tensor], Tensor]) -> tuple[int, int]:
    """The k-th largest key over all processes, and how many of that value are among the k largest."""
    prefix, remaining = 0, k
    for shift, width in _DIGITS:
        histogram = torch.zeros(2**width, dtype=torch.int64, device=keys[0].device)
        for key in keys:
            inside = key[(key >> (shift + width)) == prefix]
            histogram += torch.bincount((inside >> shift) & (2**width - 1), minlength=2**width)
        above = add(histogram).flip(0).cumsum(0)
        digit_from_top = int(torch.searchsorted(above, remaining))
        remaining -= int(above[digit_from_top - 1]) if digit_from_top else 0
        prefix = (prefix << width) | (2**width - 1 - digit_from_top)
    return prefix, remaining


def top_k(scores: Sequence[Tensor], k: int, sharding: Sharding) -> list[Tensor]:
    """Masks of the `k` highest of all scores over all processes: a radix select over the bits of the floats.

    Three histograms of at most 4,096 counts are summed over the shards; no score leaves its process. Equal scores go to
    the lower global position, tensor by tensor and row-major within one, so the mask does not depend on how the scores
    are spread.

    Args:
        scores: local scores of each tensor, float32, any shape; the same tensors in the same order on every process.
        k: how many to keep, between 0 and the number of all scores.
        sharding: over whom the scores are spread, in the order of their positions.

    Returns:
        Booleans shaped like `scores`, of which exactly `k` are true over all processes.
    """
    if k == 0:
        return [torch.zeros_like(s, dtype=torch.bool) for s in scores]
    keys = [_keys(s.reshape(-1)) for s in scores]
    threshold, at_threshold = _kth_largest(keys, k, sharding.sum_over_shards)
    ties = [key == threshold for key in keys]
    counts = torch.zeros(sharding.shards_each, len(keys), dtype=torch.int64, device=keys[0].device)
    counts[sharding.shard_index] = torch.stack([t.sum() for t in ties])
    counts = sharding.sum_over_shards(counts)
    before = counts.sum(0).cumsum(0) - counts.sum(0) + counts[: sharding.shard_index].sum(0)
    return [
        ((key > threshold) | (tie & (tie.cumsum(0) <= at_threshold - skipped))).reshape(score.shape)
        for key, tie, skipped, score in zip(keys, ties, before, scores, strict=True)
    ]


def greedy_tensors(means: Mapping[str, float], numels: Mapping[str, int], k: int) -> list[str]:
    """Whole tensors of the highest mean score that together hold at most `k` elements.

    Tensors are taken in the order of their mean score; one that does not fit any more is passed over. So the density is
    that asked for, rounded down by less than the smallest tensor left out.

    Args:
        means: mean score of each tensor by name; equal means go to the earlier tensor.
        numels: elements of each tensor by name.
        k: the budget in elements.
    """
    chosen = []
    for name in sorted(means, key=lambda n: -means[n]):
        if numels[name] <= k:
            chosen.append(name)
            k -= numels[name]
    return chosen

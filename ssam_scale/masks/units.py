"""Means over units (rows, tensors) of scores that are spread over shards: the same bits however they are spread."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from .radix import CHUNK, Processes, addresses, flat, in_threads


def unit_means(
    scores: Sequence[Tensor],
    starts: Sequence[int],
    numels: Sequence[int],
    sizes: Sequence[int],
    sharding: Processes,
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
        sharding: over whom the scores are spread.

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
    scales = [_scale(m, size) for m, size in zip(_largest(local, sharding), sizes, strict=True)]
    units = [numel // size if numel else 0 for numel, size in zip(numels, sizes, strict=True)]
    sums = torch.zeros(sum(units), dtype=torch.int64, device=local[0].device)
    add = _add_compiled if sums.device.type == "cpu" else _add_chunked
    add(local, starts, sizes, scales, units, sums)
    exact = sharding.sum_over_shards(sums).cpu().double().split(units)
    return [e / (scale * size) for e, scale, size in zip(exact, scales, sizes, strict=True)]


def _largest(scores: Sequence[Tensor], sharding: Processes) -> list[float]:
    """The largest magnitude of each tensor over all processes."""
    nothing = scores[0].new_zeros(())
    each = scores[0].new_zeros(sharding.shards_each, len(scores))
    # The extremes are found without a copy of absolute values.
    extremes = [torch.stack(torch.aminmax(s)).abs().max() if s.numel() else nothing for s in scores]
    each[sharding.shard_index] = torch.stack(extremes)
    return sharding.sum_over_shards(each).amax(0).tolist()


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
    from . import kernels  # numba takes a while to import

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
    in_threads(lambda part: kernels.sum_units(where, table[part], *rows, sums.numpy()), table)


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

"""Compiled loops over float32 scores in CPU memory: counting digits of keys, writing bits, summing units.

A score's key is an int32 in the same order: of a negative float the bits count downwards, and -0.0 has the key of 0.0.
Keys are compared as integers, so that a processor set to flush denormals does not see other ties than another one.

Tensors come as addresses: one call does all of them, where a call each would cost more than the work on a small one.
Everything compiled lies in this one file, so that numba can keep the machine code on disk.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic

from ssam_scale.native import compiled


def _pointer_to(element: Any) -> Any:
    @intrinsic
    def at(context: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.CPointer(element)(address), generate

    return at


_int32_at = _pointer_to(types.int32)
_float32_at = _pointer_to(types.float32)
_uint8_at = _pointer_to(types.uint8)

# Elements compared at a time: their results stay in the first cache.
_BLOCK = 4096

# Multiplied by eight bytes of 0 or 1, the lowest byte first, this has them as the bits of its highest byte.
_GATHER = np.uint64(0x0102040810204080)

_LOWEST = np.int32(-(2**31))


@compiled
def _key(bits: Any) -> Any:
    return bits if bits >= np.int32(0) else np.int32(_LOWEST - bits)


@compiled
def _spread(byte: Any) -> Any:
    """Eight bytes of 0 or 1, the lowest first, from the bits of one."""
    in_place = (np.uint64(byte) * np.uint64(0x0101010101010101)) & np.uint64(0x8040201008040201)
    return ((in_place + np.uint64(0x7F7F7F7F7F7F7F7F)) >> np.uint64(7)) & np.uint64(0x0101010101010101)


@compiled
def count_digits(
    scores: Any,
    candidates: Any,
    tasks: Any,
    segments: Any,
    first_segment: int,
    prefixes: Any,
    shift: int,
    width: int,
    counts: Any,
) -> None:
    """Count how often each digit occurs in the keys that begin with their segment's prefix.

    Args:
        scores: int64 [tensors], addresses of float32.
        candidates: int64 [tensors], addresses of the packed masks of what takes part, or 0 for all.
        tasks: int64 [N, 3], tensor, first element and the one after the last; the first is a multiple of 8, and
            the others are less than 2³⁴.
        segments: int64 [tensors], the segment of each.
        first_segment: what row 0 of `counts` stands for.
        prefixes: int64 [segments], the digits above this one; empty for the highest digit.
        shift: place of the digit's lowest bit.
        width: its bits.
        counts: int64 [segments from the first on, 2^width], added to.
    """
    above, mask = shift + width, (1 << width) - 1
    highest = len(prefixes) == 0
    flip = 1 << (width - 1) if highest else 0
    words = np.zeros(_BLOCK // 8, np.uint64)
    found = words.view(np.uint8)
    digits = np.empty(_BLOCK, np.uint16)
    # Neighbours count in different rows: an addition to the place of the one before would have to wait for it. What is
    # not counted goes to the last column.
    several = np.empty((4, mask + 2), np.uint32)
    for n in range(len(tasks)):
        tensor, start, stop = tasks[n, 0], tasks[n, 1], tasks[n, 2]
        bits = numba.carray(_int32_at(scores[tensor]), stop)[start:]
        live = numba.carray(_uint8_at(candidates[tensor]), (stop + 7) // 8)[start >> 3 :]
        prefix = np.int64(0) if highest else prefixes[segments[tensor]]
        several[:] = 0
        for block in range(0, len(bits), _BLOCK):
            part = bits[block : block + _BLOCK]
            used = (len(part) + 7) >> 3
            words[used - 1] = 0
            for i in range(len(part)):
                found[i] = highest or _key(part[i]) >> above == prefix
            if candidates[tensor]:
                bytes_ = live[block >> 3 :]
                for word in range(used):
                    words[word] &= _spread(bytes_[word])
            if found[: len(part)].sum() > len(part) >> 4:
                for i in range(len(part)):
                    digits[i] = np.uint16(((_key(part[i]) >> shift) & mask) ^ flip if found[i] else mask + 1)
                for i in range(len(part)):
                    several[i & 3, digits[i]] += np.uint32(1)
            else:  # few of them: looked for by eights
                for word in range(used):
                    if words[word]:
                        for i in range(8 * word, min(8 * word + 8, len(part))):
                            if found[i]:
                                several[i & 3, ((_key(part[i]) >> shift) & mask) ^ flip] += np.uint32(1)
        row = counts[segments[tensor] - first_segment]
        for i in range(mask + 1):
            row[i] += np.int64(several[0, i]) + several[1, i] + several[2, i] + several[3, i]


@compiled
def count_equal(scores: Any, candidates: Any, tasks: Any, segments: Any, thresholds: Any, counts: Any) -> None:
    """Count the keys that equal their segment's threshold.

    Args:
        scores: as for `count_digits`.
        candidates: as for `count_digits`.
        tasks: as for `count_digits`.
        segments: as for `count_digits`.
        thresholds: int32 [segments], keys.
        counts: int64 [N], of each task, written to.
    """
    for n in range(len(tasks)):
        tensor, start, stop = tasks[n, 0], tasks[n, 1], tasks[n, 2]
        bits = numba.carray(_int32_at(scores[tensor]), stop)[start:]
        threshold = thresholds[segments[tensor]]
        count = 0
        if candidates[tensor]:
            live = numba.carray(_uint8_at(candidates[tensor]), (stop + 7) // 8)[start >> 3 :]
            for i in range(len(bits)):
                count += (_key(bits[i]) == threshold) & (live[i >> 3] >> (i & 7) & 1)
        else:
            for i in range(len(bits)):
                count += _key(bits[i]) == threshold
        counts[n] = count


@compiled
def write_bits(
    scores: Any, candidates: Any, tasks: Any, segments: Any, thresholds: Any, equal: Any, ties: Any, out: Any
) -> None:
    """Set a bit for every key above its segment's threshold, and for the first ones of those equal to it.

    Args:
        scores: as for `count_digits`.
        candidates: as for `count_digits`.
        tasks: as for `count_digits`.
        segments: as for `count_digits`.
        thresholds: int32 [segments], keys.
        equal: int64 [N], how many keys of each task equal the threshold.
        ties: int64 [N], how many of those get a bit.
        out: int64 [tensors], addresses of uint8, written to.
    """
    words = np.zeros(_BLOCK // 8, np.uint64)
    found = words.view(np.uint8)
    for n in range(len(tasks)):
        tensor, start, stop = tasks[n, 0], tasks[n, 1], tasks[n, 2]
        bits = numba.carray(_int32_at(scores[tensor]), stop)[start:]
        packed = numba.carray(_uint8_at(out[tensor]), (stop + 7) // 8)[start >> 3 :]
        threshold, left = thresholds[segments[tensor]], ties[n]
        some = 0 < left < equal[n]
        # Without ties to tell apart one comparison an element decides, and the compiler makes vectors of the loop.
        bound = np.int32(threshold - 1) if left and not some else threshold
        for block in range(0, len(bits), _BLOCK):
            part = bits[block : block + _BLOCK]
            words[(len(part) - 1) >> 3] = 0
            for i in range(len(part)):
                found[i] = _key(part[i]) > bound
            bytes_ = packed[block >> 3 :]
            for word in range((len(part) + 7) >> 3):
                bytes_[word] = (words[word] * _GATHER) >> np.uint64(56)
        if candidates[tensor]:
            live = numba.carray(_uint8_at(candidates[tensor]), (stop + 7) // 8)[start >> 3 :]
            for byte in range(len(packed)):
                packed[byte] &= live[byte]
        if some:
            for i in range(len(bits)):
                if _key(bits[i]) == threshold and (not candidates[tensor] or live[i >> 3] >> (i & 7) & 1):
                    packed[i >> 3] |= 1 << (i & 7)
                    left -= 1
                    if not left:
                        break


@compiled
def sum_units(scores: Any, tasks: Any, starts: Any, sizes: Any, scales: Any, firsts: Any, sums: Any) -> None:
    """Add every unit's scores, as multiples of 1 / scale, to its sum; no unit may be in two calls at once.

    Args:
        scores: int64 [tensors], addresses of float32.
        tasks: int64 [N, 3], tensor, first local element and the one after the last.
        starts: int64 [tensors], position of the first local element in the whole tensor.
        sizes: int64 [tensors], elements of a unit.
        scales: float64 [tensors], powers of two.
        firsts: int64 [tensors], where in `sums` the first unit of the whole tensor stands.
        sums: int64 [units], added to.
    """
    for n in range(len(tasks)):
        tensor, position, stop = tasks[n, 0], tasks[n, 1], tasks[n, 2]
        values = numba.carray(_float32_at(scores[tensor]), stop)
        start, size, scale = starts[tensor], sizes[tensor], scales[tensor]
        while position < stop:
            unit = (start + position) // size
            end = min(stop, (unit + 1) * size - start)
            total = np.int64(0)
            for i in range(position, end):
                total += np.int64(np.rint(np.float64(values[i]) * scale))
            sums[firsts[tensor] + unit] += total
            position = end

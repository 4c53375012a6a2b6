"""XXH64, a hash of 64 bits that is as fast as memory: by its specification (xxHash, algorithm of 64 bits, seed 0).

It finds damage, not malice: 10 GB/s of one core, where SHA-256 does 1.8.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ssam_scale.native import compiled

_P1 = np.uint64(0x9E3779B185EBCA87)
_P2 = np.uint64(0xC2B2AE3D27D4EB4F)
_P3 = np.uint64(0x165667B19E3779F9)
_P4 = np.uint64(0x85EBCA77C2B2AE63)
_P5 = np.uint64(0x27D4EB2F165667C5)
_STRIPE = 32  # bytes: a word for each of four sums


@compiled
def _rotated(word: Any, by: int) -> Any:
    return (word << np.uint64(by)) | (word >> np.uint64(64 - by))


@compiled
def _round(total: Any, word: Any) -> Any:
    return _rotated(total + word * _P2, 31) * _P1


@compiled
def _merged(digest: Any, total: Any) -> Any:
    return (digest ^ _round(np.uint64(0), total)) * _P1 + _P4


@compiled
def _little_endian(data: Any, start: int, count: int) -> Any:
    word = np.uint64(0)
    for index in range(count):
        word |= np.uint64(data[start + index]) << np.uint64(8 * index)
    return word


@compiled
def xxh64(data: Any) -> Any:
    """The hash of bytes: uint64 of uint8 [bytes], contiguous."""
    count, place = len(data), 0
    if count >= _STRIPE:
        words = data[: count // 8 * 8].view(np.uint64)
        a, b, c, d = _P1 + _P2, _P2, np.uint64(0), np.uint64(0) - _P1
        for word in range(0, count // _STRIPE * 4, 4):
            a, b = _round(a, words[word]), _round(b, words[word + 1])
            c, d = _round(c, words[word + 2]), _round(d, words[word + 3])
        digest = _rotated(a, 1) + _rotated(b, 7) + _rotated(c, 12) + _rotated(d, 18)
        digest = _merged(_merged(_merged(_merged(digest, a), b), c), d)
        place = count // _STRIPE * _STRIPE
    else:
        digest = _P5
    digest += np.uint64(count)
    while place + 8 <= count:
        digest = _rotated(digest ^ _round(np.uint64(0), _little_endian(data, place, 8)), 27) * _P1 + _P4
        place += 8
    if place + 4 <= count:
        digest = _rotated(digest ^ (_little_endian(data, place, 4) * _P1), 23) * _P2 + _P3
        place += 4
    while place < count:
        digest = _rotated(digest ^ (np.uint64(data[place]) * _P5), 11) * _P1
        place += 1
    digest = (digest ^ (digest >> np.uint64(33))) * _P2
    digest = (digest ^ (digest >> np.uint64(29))) * _P3
    return digest ^ (digest >> np.uint64(32))


@compiled
def hash_pieces(data: Any, starts: Any, sizes: Any, out: Any) -> None:
    """The hashes of pieces of a file.

    Args:
        data: uint8 [bytes].
        starts: int64 [N], of each piece.
        sizes: int64 [N], bytes.
        out: uint64 [N], written to.
    """
    for index in range(len(starts)):
        out[index] = xxh64(data[starts[index] : starts[index] + sizes[index]])

"""What becomes of bytes on a disk that fails."""

from __future__ import annotations


def flipped(raw: bytes, bit: int) -> bytes:
    """The bytes with one bit changed, counted from the lowest of the first byte."""
    changed = bytearray(raw)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)

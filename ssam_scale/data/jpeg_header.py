"""Sizes of JPEGs, read from their headers."""

from __future__ import annotations

from typing import Any

from ssam_scale.native import compiled

_START, _END, _SCAN = 0xD8, 0xD9, 0xDA
_SEQUENTIAL = (0xC0, 0xC1)  # the frames of baseline and extended JPEGs, Huffman-coded
_TABLES = (0xC4, 0xC8, 0xCC)  # the rest of C0 to CF are other kinds of frames


@compiled
def jpeg_sizes(data: Any, starts: Any, sizes: Any, heights: Any, widths: Any) -> None:
    """Height and width of images that are JPEGs of one or three colours, sequential, of 8 bits; 0 of all others.

    Args:
        data: uint8 [bytes], what the images lie in.
        starts: int64 [N], where in `data`.
        sizes: int64 [N], bytes.
        heights: int64 [N], written to, pixels.
        widths: int64 [N], written to, pixels.
    """
    for k in range(len(starts)):
        heights[k] = widths[k] = 0
        place, end = starts[k], starts[k] + sizes[k]
        if sizes[k] < 4 or data[place] != 0xFF or data[place + 1] != _START:
            continue
        place += 2
        while place + 10 <= end and data[place] == 0xFF:
            marker = data[place + 1]
            if marker == 0xFF:  # a byte that fills
                place += 1
                continue
            if marker in _SEQUENTIAL:
                height, width = data[place + 5] * 256 + data[place + 6], data[place + 7] * 256 + data[place + 8]
                if data[place + 4] == 8 and data[place + 9] in (1, 3) and height > 0 and width > 0:
                    heights[k], widths[k] = height, width
                break
            if _END <= marker <= _SCAN or (0xC0 <= marker <= 0xCF and marker not in _TABLES):
                break
            place += 2 + data[place + 2] * 256 + data[place + 3]

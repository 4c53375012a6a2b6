"""Scans of a JPEG: whether all that its frame announces are there.

A file that is cut off between two scans, and ended there by whoever repaired it, is in order for libjpeg and Pillow,
which show what there is: of a progressive one a blurred picture, of another one colours that are missing.
"""

from __future__ import annotations

import re

_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")  # neither a stuffed byte nor a restart within a scan
_END, _SCAN = 0xD9, 0xDA
_ALONE = {0x01, 0xD8}  # markers without a segment
_FRAMES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # which are tables, and one that is reserved
_COEFFICIENTS = 64


def missing_scans(data: bytes) -> str | None:
    """Why a JPEG is not whole, by the spectral bands and bits of its scans (ITU-T T.81, B.2.3 and G.1.1); None: it is.

    Says nothing of what is within scans, which decoding shows.
    """
    lacking: dict[int, list[int | None]] = {}  # by component and coefficient, the bits that have not come yet
    scans = place = 0
    while (found := _MARKER.search(data, place)) is not None:
        code, place = data[found.end() - 1], found.end()
        if code == _END:
            break
        if code in _ALONE:
            continue
        length = int.from_bytes(data[place : place + 2], "big")
        segment = data[place + 2 : place + length]
        place += length
        if code in _FRAMES and not lacking and len(segment) > 5:
            lacking = {component: [None] * _COEFFICIENTS for component in segment[6 : 6 + 3 * segment[5] : 3]}
        elif code == _SCAN and segment and len(segment) >= 4 + 2 * segment[0]:
            scans += 1
            count = segment[0]
            first, last, bits = segment[1 + 2 * count : 4 + 2 * count]
            for component in segment[1 : 1 + 2 * count : 2]:
                if component in lacking and last < _COEFFICIENTS:
                    lacking[component][first : last + 1] = [bits & 15] * (last + 1 - first)
            if not any(any(left != 0 for left in each) for each in lacking.values()):
                return None
    if not lacking or not scans:
        return None  # which the decoder has a word for
    return f"scans are missing: a JPEG in several of them, of which only {scans} {'is' if scans == 1 else 'are'} there"

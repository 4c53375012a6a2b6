"""Which known name a misspelt one was meant to be."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, valid: Iterable[str]) -> str | None:
    """The valid name that `name` most likely was meant to be, if any comes near."""
    # Half the letters is near enough: a short name such as lr loses half of itself with one wrong letter.
    near = difflib.get_close_matches(name, list(valid), n=5, cutoff=0.5)
    # difflib compares common runs of letters, by which "worder" is nearer to workers than to order.
    return min(near, key=lambda known: _edits(name, known), default=None)


def _edits(one: str, other: str) -> int:
    """How many letters must be added, left out, changed or exchanged with the next to make one word the other."""
    before, last = [0] * (len(other) + 1), list(range(len(other) + 1))
    for i, letter in enumerate(one, 1):
        row = [i]
        for j, wanted in enumerate(other, 1):
            steps = min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (letter != wanted))
            if i > 1 and j > 1 and letter == other[j - 2] and one[i - 2] == wanted:
                steps = min(steps, before[j - 2] + 1)
            row.append(steps)
        before, last = last, row
    return last[-1]

"""Which values of a test's parameter the normal tiers take; the others are for `-m exhaustive`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def few(every: Iterable[Any], *kept: Any) -> list[Any]:
    """All values of a parameter, of which those that are not kept are left to the exhaustive tier.

    Raises:
        ValueError: one that is to be kept is not among them.
    """
    values = list(every)
    if missing := [value for value in kept if value not in values]:
        raise ValueError(f"{missing[0]} is none of {values}")
    return [value if value in kept else pytest.param(value, marks=pytest.mark.exhaustive) for value in values]

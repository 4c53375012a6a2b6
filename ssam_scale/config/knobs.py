"""Values of what is tried, by dotted key: all of a grid, as overrides, in words."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

Knobs = tuple[tuple[str, Any], ...]
"""Dotted keys and their values."""


def product(grid: Mapping[str, Sequence[Any]]) -> list[Knobs]:
    """Every combination of one value of each key; of no keys, one without any."""
    return [tuple(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def as_override(key: str, value: Any) -> str:
    """What `load` takes as an override."""
    return f"{key}={json.dumps(value, default=str)}"


def flat(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted key; of an empty section, that."""
    found: dict[str, Any] = {}
    for key, value in section.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def in_words(knobs: Knobs) -> str:
    """Knobs as a short text: `rho=0.1`, and `as set` of none."""
    named = (f"{key.rpartition('.')[2]}={_short(value)}" for key, value in knobs)
    return " ".join(named) or "as set"


def _short(value: Any) -> str:
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.12g}"
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))

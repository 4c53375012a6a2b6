"""A configuration as MLflow's parameters."""

from __future__ import annotations

import json
from typing import Any

from ssam_scale.config.schema import Config
from ssam_scale.tracking.store import without_password

# The limit of MLflow's stores.
_CHARACTERS = 6000


def flatten(config: Config) -> dict[str, str]:
    """Parameters of a run: dotted key to value; lists as JSON, absence as `null`."""
    flat: dict[str, str] = {}

    def visit(prefix: str, value: Any) -> None:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                visit(f"{prefix}.{key}" if prefix else key, inner)
        else:
            flat[prefix] = value if isinstance(value, str) else json.dumps(value)

    visit("", plain(config))
    return {key: cut(value, _CHARACTERS) for key, value in flat.items()}


def plain(config: Config) -> dict[str, Any]:
    """The configuration in plain values, without the password of its tracking URI."""
    values = config.model_dump(mode="json")
    values["tracking"]["uri"] = without_password(values["tracking"]["uri"])
    return values


def cut(text: str, length: int) -> str:
    """`text` in at most `length` characters."""
    return text if len(text) <= length else text[: length - 1] + "…"

"""Which runs repeat one another: those of one configuration but for the seed, on the same kind of machine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

# Parameters that do not make a run another experiment: seeds are pooled, the rest changes no result.
POOLED = (
    "train.seed",
    "train.micro_batch",
    "train.max_micro_batch",
    "tracking.",
    "checkpoint.",
    "sharpness",
    "data.workers",
    "data.eval_batch_size",
)
WHERE = "backend", "world_size", "hardware"
"""Tags that say where a run ran."""
CONFIGURATION, KIND = "configuration", "kind"
"""Tags: `fingerprint` of a run; and what a run is that is no training."""


def distinct(params: Mapping[str, str]) -> dict[str, str]:
    """The parameters that make a run what it is."""
    return {key: value for key, value in params.items() if not key.startswith(POOLED)}


def identity(params: Mapping[str, str], tags: Mapping[str, str]) -> dict[str, str]:
    """All that makes it another than others: parameters, and where it ran."""
    return distinct(params) | {key: tags.get(key, "—") for key in WHERE}


def fingerprint(params: Mapping[str, str], tags: Mapping[str, str]) -> str:
    """Twelve hexadecimal digits of `identity` and the method, for a tag by which repetitions find each other."""
    text = json.dumps([tags.get("method"), sorted(identity(params, tags).items())])
    return hashlib.sha256(text.encode()).hexdigest()[:12]

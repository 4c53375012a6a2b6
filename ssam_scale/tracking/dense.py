"""Which runs are dense SAM: decided here only, by a run's parameters as MLflow has them (`store.flatten`)."""

from __future__ import annotations

from collections.abc import Mapping


def ascends_densely(params: Mapping[str, str]) -> bool:
    """Whether an ascent is dense SAM's: of all weights, on the whole batch of all processes, with no term of a loss."""
    if not any(key.startswith("perturbation.") for key in params):
        return False
    if any(key.startswith(("perturbation.mask.", "perturbation.descent.", "trajectory.")) for key in params):
        return False
    return all(_is(params, key, usual) for key, usual in _OF_ALL_SAMPLES.items())


_OF_ALL_SAMPLES = {
    "direction.source": "fresh",
    "direction.fraction": "1.0",
    "direction.scope": "global",
    "gap": "0.0",
    "loss_budget": "null",
    # As they were called before there were directions.
    "fraction": "1.0",
    "savings.within_shard_group": "false",
}


def is_dense_sam(params: Mapping[str, str]) -> bool:
    """Whether each of its steps has such an ascent."""
    always = _is(params, "interval", "1") and _is(params, "window", "[0.0, 1.0]")
    return ascends_densely(params) and always and "perturbation.gate.delta" not in params


def _is(params: Mapping[str, str], key: str, usual: str) -> bool:
    """Whether a setting has its usual value, as it has where an older version did not know it."""
    return params.get(f"perturbation.{key}", usual) == usual

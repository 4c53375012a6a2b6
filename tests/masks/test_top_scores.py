"""What is perturbed: masks chosen by scores."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssam_scale.config.mask_sections import Allocation
from ssam_scale.masks import Layout, Scored
from ssam_scale.sharding import ProcessGroup

ALLOCATIONS = get_args(Allocation)
ALONE = ProcessGroup()


def one(values: dict[str, torch.Tensor]) -> dict[Any, dict[str, torch.Tensor]]:
    return {"fisher": values}


@settings(deadline=None)  # the first one compiles
@given(st.floats(0, 0.999), st.lists(st.integers(1, 40), min_size=1, max_size=5), st.sampled_from(ALLOCATIONS))
def test_the_density_of_single_weights_is_exact(sparsity: float, sizes: list[int], allocation: Any) -> None:
    shapes = {str(i): (n,) for i, n in enumerate(sizes)}
    layout = Layout(shapes, dict.fromkeys(shapes, 0), 1)
    expected = int(sum(sizes) * (1 - sparsity))
    mask = Scored("element", sparsity, allocation=allocation)
    scores = {name: torch.rand(n) for name, n in shapes.items()}
    if not expected:
        with pytest.raises(ValueError, match="leaves nothing"):
            mask.refresh(layout, one(scores), ALONE, 0)
        return
    mask.refresh(layout, one(scores), ALONE, 0)
    plan = mask.plan(layout, 0)
    counts = {n: layout.numels[n] if part is None else part.count for n, part in plan.weights.items()}
    assert plan.perturbed == sum(counts.values()) == expected
    assert dict(plan.counts) == counts
    assert all(counts.values()), "what is not perturbed at all must not be named: it would be paid for"


@pytest.mark.parametrize("pattern", ["row", "tensor", "block"])
def test_at_random_every_unit_is_as_likely_as_any_other_of_whatever_size(pattern: Any) -> None:
    """By means of random numbers of their elements, the largest of four was the first half as often as it should be."""
    shapes = {str(size): (1, size) for size in (1, 10, 100, 1000)}
    layout = Layout(shapes, {name: number for number, name in enumerate(shapes)}, len(shapes))
    scores: dict[Any, Any] = {"random": {name: torch.rand(shape) for name, shape in shapes.items()}}
    mask = Scored(pattern, 1.0 - 1000.5 / 1111.0, score="random")  # either the largest, or the other three
    first = 0
    for step in range(4000):
        mask.refresh(layout, {kind: scores[kind] for kind in mask.wanted()}, ALONE, step)
        first += "1000" in mask.plan(layout, step).weights
    assert first == pytest.approx(1000, abs=4 * math.sqrt(4000 * 0.25 * 0.75))


def test_scores_that_are_not_finite_are_named_and_leave_the_mask() -> None:
    layout = Layout({"a": (3,), "b": (3,)}, {"a": 0, "b": 0}, 1)
    mask = Scored("element", 0.5)
    mask.refresh(layout, one({"a": torch.ones(3), "b": torch.zeros(3)}), ALONE, 0)
    before = mask.selected
    with pytest.raises(FloatingPointError, match="scores of b"):
        mask.refresh(layout, one({"a": torch.ones(3), "b": torch.tensor([0.0, math.nan, 1.0])}), ALONE, 1)
    assert mask.selected is before
    # A sum that overflows is not a score that is not finite.
    mask.refresh(layout, one({"a": torch.full((3,), 3e38), "b": torch.zeros(3)}), ALONE, 1)
    assert list(mask.plan(layout, 1).weights) == ["a"]

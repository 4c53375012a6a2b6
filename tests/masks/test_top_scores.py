"""What is perturbed: masks chosen by scores."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssam_scale import SparseSAM
from ssam_scale.config.mask_sections import Allocation
from ssam_scale.masks import Layout, Scored
from ssam_scale.sharding import ProcessGroup
from tests.support.networks import batches, loss_fn, small_network

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


def times_chosen(mask: Scored, layout: Layout, refreshes: int) -> dict[str, int]:
    """How often each parameter is perturbed at all."""
    scores: dict[Any, Any] = {"random": {name: torch.rand(shape) for name, shape in layout.shapes.items()}}
    times = dict.fromkeys(layout.shapes, 0)
    for step in range(refreshes):
        mask.refresh(layout, {kind: scores[kind] for kind in mask.wanted()}, ALONE, step)
        for name in mask.plan(layout, step).weights:
            times[name] += 1
    return times


SIZES = {str(size): (1, size) for size in (1, 2, 3, 10, 100, 1000)}
EACH_A_BLOCK = Layout(SIZES, {name: number for number, name in enumerate(SIZES)}, len(SIZES))


@pytest.mark.parametrize("pattern", ["tensor", "block"])
@pytest.mark.parametrize("sparsity", [0.2, 0.6])
def test_drawn_independently_each_tensor_or_block_is_as_likely_as_any_other_of_whatever_size(
    pattern: Any, sparsity: float
) -> None:
    """Within a budget the largest, of nine tenths of the weights, is hardly ever drawn, and the small ones always."""
    mask = Scored(pattern, sparsity, score="random", independent=True)
    times = times_chosen(mask, EACH_A_BLOCK, 4000)
    none = sparsity ** len(SIZES)  # then one of them is
    expected = 1.0 - sparsity + none / len(SIZES)
    spread = math.sqrt(4000 * expected * (1.0 - expected))
    assert times == {name: pytest.approx(4000 * expected, abs=4 * spread) for name in SIZES}


@pytest.mark.parametrize("pattern", ["row", "tensor", "block"])
def test_at_random_every_unit_has_one_number_whatever_its_size(pattern: Any) -> None:
    """By means of random numbers of their elements, the largest of four was the first half as often as it should be."""
    shapes = {name: SIZES[name] for name in ("1", "10", "100", "1000")}
    layout = Layout(shapes, {name: number for number, name in enumerate(shapes)}, len(shapes))
    mask = Scored(pattern, 1.0 - 1000.5 / 1111.0, score="random")  # either the largest, or the other three
    times = times_chosen(mask, layout, 4000)
    assert times["1000"] == pytest.approx(1000, abs=4 * math.sqrt(4000 * 0.25 * 0.75))
    assert set(times.values()) == {times["1000"], 4000 - times["1000"]}


@pytest.mark.parametrize("pattern", ["row", "tensor", "block"])
def test_units_without_a_score_are_drawn_and_not_taken_from_the_beginning(pattern: Any) -> None:
    shapes = {f"{number}": (4, 4) for number in range(6)}
    layout = Layout(shapes, {name: number for number, name in enumerate(shapes)}, len(shapes))
    scores = {name: torch.zeros(shape) for name, shape in shapes.items()}
    scores["3"] += 1e-30
    times = dict.fromkeys(shapes, 0)
    for seed in range(300):
        mask = Scored(pattern, 0.5, seed=seed)
        mask.refresh(layout, one(scores), ALONE, 0)
        for name, count in mask.plan(layout, 0).counts.items():
            times[name] += count
    assert times.pop("3") == 300 * 16, "what has one comes first"
    assert all(300 * 16 * 0.25 < count < 300 * 16 * 0.55 for count in times.values()), times


def test_single_weights_without_a_score_are_drawn_and_not_taken_from_the_beginning() -> None:
    """A ResNet of timm begins with the last norm of each branch at zero, so that no gradient comes into the branch."""
    model = small_network("resnet")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bn2.weight"):
                p.zero_()
    opt = SparseSAM(model, torch.optim.SGD(model.parameters(), lr=0.1), mask=Scored("element", 0.5))
    opt.refresh(loss_fn, batches(1, 4)[0], samples=4)
    silent = [n for n in opt.parameters.by_name if ".conv" in n and "layer" in n]
    assert silent
    total, counts = opt.parameters.layout.numels, opt.plan.counts
    shares = {name: counts.get(name, 0) / total[name] for name in silent}
    assert max(shares.values()) - min(shares.values()) < 0.2, shares
    assert opt.plan.perturbed == opt.parameters.layout.total // 2


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

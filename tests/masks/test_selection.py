"""The k highest of scores that are spread over processes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ssam_scale.masks import Depth, Layout, Scored
from ssam_scale.masks.selection import greedy_tensors, top_k
from ssam_scale.sharding import World, sharding_of
from ssam_scale.sharding.fsdp import shard_fsdp2
from tests.support.ranks import run_ranks

ALONE = sharding_of(nn.Linear(1, 1))


def by_sorting(scores: list[torch.Tensor], k: int) -> list[torch.Tensor]:
    """The definition: sort all scores, the highest first, equal ones by position."""
    flat = torch.cat([s.reshape(-1) for s in scores])
    order = sorted(range(len(flat)), key=lambda i: (-float(flat[i]), i))
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[order[:k]] = True
    return [m.reshape(s.shape) for m, s in zip(mask.split([s.numel() for s in scores]), scores, strict=True)]


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
ties = st.sampled_from([0.0, -0.0, 1.0, 1e-45, -1.0, 3.4e38])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(finite | ties, min_size=0, max_size=12), min_size=1, max_size=4), st.data())
def test_equals_sorting(values: list[list[float]], data: st.DataObject) -> None:
    scores = [torch.tensor(v, dtype=torch.float32) for v in values]
    k = data.draw(st.integers(0, sum(map(len, values))))
    masks = top_k(scores, k, ALONE)
    assert sum(int(m.sum()) for m in masks) == k
    assert all(torch.equal(a, b) for a, b in zip(masks, by_sorting(scores, k), strict=True))


SHAPES = [(5, 3), (1,), (4, 2, 2), (2,), (7,)]


def _scores(kind: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    if kind == "ties":
        return [torch.randint(3, shape, generator=generator).float() for shape in SHAPES]
    if kind == "equal":
        return [torch.zeros(shape) for shape in SHAPES]
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def _select_on_shards(world: World) -> dict[str, list[list[torch.Tensor]]]:
    model = nn.ParameterList([nn.Parameter(torch.zeros(shape)) for shape in SHAPES])
    shard_fsdp2(model, [], world.device)
    sharding, parameters = sharding_of(model), list(model.parameters())
    result: dict[str, list[list[torch.Tensor]]] = {}
    for kind in ("ties", "equal", "random"):
        whole = _scores(kind)
        local = [sharding.scatter(p, s) for p, s in zip(parameters, whole, strict=True)]
        for k in range(sum(s.numel() for s in whole) + 1):
            masks = top_k(local, k, sharding)
            gathered = [sharding.gather(p, m) for p, m in zip(parameters, masks, strict=True)]
            result.setdefault(kind, []).append(gathered)
    return result


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
def test_shards_uneven_or_empty_choose_what_one_process_chooses(size: int) -> None:
    for rank in run_ranks(size, _select_on_shards):
        for kind, chosen in rank.items():
            for k, masks in enumerate(chosen):
                expected = by_sorting(_scores(kind), k)
                assert all(torch.equal(a, b) for a, b in zip(masks, expected, strict=True)), (kind, k)


@given(st.lists(st.tuples(st.floats(0, 10), st.integers(1, 50)), min_size=1, max_size=12), st.integers(0, 200))
def test_greedy_tensors_fit_and_nothing_better_was_left_out(tensors: list[tuple[float, int]], k: int) -> None:
    means = {str(i): mean for i, (mean, _) in enumerate(tensors)}
    numels = {str(i): numel for i, (_, numel) in enumerate(tensors)}
    chosen = greedy_tensors(means, numels, k)
    held = sum(numels[name] for name in chosen)
    assert held <= k
    for name in set(means) - set(chosen):
        better = sum(numels[c] for c in chosen if means[c] >= means[name])
        assert better + numels[name] > k, "a tensor that fitted in its turn was passed over"


@given(st.floats(0, 0.999), st.lists(st.integers(1, 40), min_size=1, max_size=5))
def test_density_is_exact(sparsity: float, sizes: list[int]) -> None:
    names = {str(i): n for i, n in enumerate(sizes)}
    layout = Layout(names, dict.fromkeys(names, 0), 1)
    expected = int(sum(sizes) * (1 - sparsity))
    mask = Scored("element", sparsity)
    scores = {name: torch.rand(n) for name, n in names.items()}
    if not expected:
        with pytest.raises(ValueError, match="nothing"):
            mask.select(layout, scores, ALONE)
        return
    mask.select(layout, scores, ALONE)
    plan = mask.plan(layout, 0)
    assert plan.perturbed == sum(int(m.sum()) for m in plan.weights.values()) == expected


def test_scores_that_are_not_finite_are_named_and_leave_the_mask() -> None:
    layout = Layout({"a": 3, "b": 3}, {"a": 0, "b": 0}, 1)
    mask = Scored("element", 0.5)
    mask.select(layout, {"a": torch.ones(3), "b": torch.zeros(3)}, ALONE)
    before = mask.selected
    with pytest.raises(FloatingPointError, match="scores of b"):
        mask.select(layout, {"a": torch.ones(3), "b": torch.tensor([0.0, math.nan, 1.0])}, ALONE)
    assert mask.selected is before


def test_a_moving_cut_is_a_function_of_seed_and_step_and_uniform() -> None:
    layout = Layout({f"{i}": 1 for i in range(8)}, {f"{i}": i for i in range(8)}, 8)
    mask, again = Depth(seed=4), Depth(seed=4)
    cuts = [mask.plan(layout, step).cut for step in range(4000)]
    assert cuts[::-1] == [again.plan(layout, step).cut for step in reversed(range(4000))]
    assert cuts != [Depth(seed=5).plan(layout, step).cut for step in range(4000)]
    counts = [cuts.count(c) for c in range(8)]
    assert sum(counts) == 4000
    # Each count is binomial with mean 500 and deviation 21.
    assert all(abs(count - 500) < 5 * 21 for count in counts)
    for step in range(20):
        plan = mask.plan(layout, step)
        assert set(plan.weights) == {str(i) for i in range(plan.cut, 8)}
        assert plan.perturbed == 8 - plan.cut

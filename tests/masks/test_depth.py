"""The moving cut: where it may be, how likely it is, and what is saved of that."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ssam_scale.masks import AnnealedCut, Depth, DepthByCost, Layout, suffix_sums
from ssam_scale.masks.depth import probabilities_by_cost
from ssam_scale.sharding import ProcessGroup

BLOCKS = 8
# Two parameters a block: a matrix and a vector.
SHAPES = {f"{i}.{name}": shape for i in range(BLOCKS) for name, shape in (("weight", (3, 2)), ("bias", (3,)))}
LAYOUT = Layout(SHAPES, {name: int(name[0]) for name in SHAPES}, BLOCKS)
ALONE = ProcessGroup()
SECONDS = (8.0, 7.5, 6.0, 5.5, 4.0, 3.0, 1.0, 0.5)


def fisher(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(shape, generator=generator) ** 4 for name, shape in SHAPES.items()}


def drawn(mask: Depth, steps: int) -> list[int]:
    return [mask.plan(LAYOUT, step).cut for step in range(steps)]


def measured(mask: DepthByCost, seed: int = 0, step: int = 0) -> DepthByCost:
    mask.check(LAYOUT)
    mask.refresh(LAYOUT, {"fisher": fisher(seed)}, ALONE, step)
    return mask


def check_frequencies(cuts: Sequence[int], probabilities: Sequence[float]) -> None:
    """Each count is binomial: within five of its deviations, which chance leaves once in 10^6 counts."""
    n = len(cuts)
    for cut, p in enumerate(probabilities):
        assert abs(cuts.count(cut) - n * p) <= 5 * math.sqrt(n * p * (1 - p)), (cut, p)


def test_a_moving_cut_is_a_function_of_seed_and_step_and_uniform() -> None:
    mask, again = Depth(seed=4), Depth(seed=4)
    cuts = drawn(mask, 4000)
    assert cuts[::-1] == [again.plan(LAYOUT, step).cut for step in reversed(range(4000))]
    assert cuts != drawn(Depth(seed=5), 4000)
    check_frequencies(cuts, [1 / BLOCKS] * BLOCKS)
    for step in range(20):
        plan = mask.plan(LAYOUT, step)
        assert set(plan.weights) == {name for name in SHAPES if int(name[0]) >= plan.cut}
        assert plan.perturbed == 9 * (BLOCKS - plan.cut)


@pytest.mark.parametrize(
    ("cut", "cuts"), [((0.0, 1.0), range(8)), ((0.25, 0.5), range(2, 5)), ((0.5, 0.5), [4]), ((1.0, 1.0), [7])]
)
def test_cuts_stay_in_their_range_and_reach_both_ends(cut: tuple[float, float], cuts: Sequence[int]) -> None:
    assert set(drawn(Depth(cut), 300)) == set(cuts)
    assert set(drawn(measured(DepthByCost(cut, seconds=SECONDS)), 300)) == set(cuts)


def test_an_annealed_range_moves_along_half_a_cosine_and_stays_at_its_end() -> None:
    mask = Depth(AnnealedCut((0.0, 0.25), (0.5, 1.0), 100), seed=1)
    for step in (0, 20, 50, 90, 100, 1000):
        left = (1 + math.cos(math.pi * min(step, 100) / 100)) / 2
        low, high = round(8 * 0.5 * (1 - left)), min(round(8 * (0.25 * left + 1 - left)), 7)
        cuts = range(low, high + 1)
        assert mask.probabilities(BLOCKS, step) == [(cut in cuts) / len(cuts) for cut in range(BLOCKS)]
    assert set(drawn(mask, 10)) <= {0, 1, 2}
    assert {mask.plan(LAYOUT, step).cut for step in range(100, 200)} == {4, 5, 6, 7}


def test_probabilities_by_cost_are_fisher_mass_of_the_suffix_over_its_time() -> None:
    mask, scores = measured(DepthByCost((0.25, 0.75), seconds=SECONDS, seed=7)), fisher(0)
    worth = []
    for cut in range(BLOCKS):
        mass = sum(float(x) for name, s in scores.items() if int(name[0]) >= cut for x in s.flatten())
        worth.append(mass / SECONDS[cut] if 2 <= cut <= 6 else 0.0)
    probabilities = mask.probabilities(BLOCKS, 3)
    # Exact sums there, sums of float64 in an order of their own here.
    assert probabilities == pytest.approx([w / sum(worth) for w in worth], rel=1e-12)
    assert sum(probabilities) == pytest.approx(1.0, rel=1e-12)
    assert max(probabilities) > 2 * min(p for p in probabilities if p), "or the frequencies show nothing"
    check_frequencies(drawn(mask, 4000), probabilities)


@given(st.lists(st.tuples(st.floats(0.0, 1e3), st.floats(1e-3, 1e3)), min_size=1, max_size=20))
@example([(5e-324, 2.0)])  # half of the smallest number is none
@example([(1e3, 1e3), (5e-324, 1e-3), (0.0, 1.0)])
def test_mass_over_time_is_never_below_that_of_uniform_draws(blocks: list[tuple[float, float]]) -> None:
    masses, seconds = (suffix_sums(values) for values in zip(*blocks, strict=True))
    probabilities = probabilities_by_cost(masses, seconds, range(len(blocks)))
    if probabilities is None:
        assert not any(masses)
        return
    assert sum(probabilities) == pytest.approx(1.0, rel=1e-12)
    # In fractions, as sums and products of the smallest numbers are nowhere near what they should be.
    drawn = [Fraction(p) for p in probabilities]
    mass, time = (sum(p * Fraction(v) for p, v in zip(drawn, x, strict=True)) for x in (masses, seconds))
    uniform_mass, uniform_time = (sum(map(Fraction, x)) for x in (masses, seconds))
    assert mass * uniform_time >= uniform_mass * time * Fraction(1 - 1e-9)


def test_the_unit_of_time_and_the_number_of_samples_do_not_matter() -> None:
    one = measured(DepthByCost(seconds=SECONDS))
    other = DepthByCost(seconds=[1000 * t for t in SECONDS])
    other.check(LAYOUT)
    other.refresh(LAYOUT, {"fisher": {name: 4 * s for name, s in fisher(0).items()}}, ALONE, 0)
    assert other.probabilities(BLOCKS, 0) == pytest.approx(one.probabilities(BLOCKS, 0), rel=1e-12)


def test_a_refresh_changes_the_probabilities_and_is_due_when_it_was_said() -> None:
    mask = DepthByCost(seconds=SECONDS, every=5)
    assert mask.is_due(0)
    first = measured(mask).probabilities(BLOCKS, 0)
    assert [step for step in range(11) if mask.is_due(step)] == [5, 10]
    assert measured(mask, seed=1, step=5).probabilities(BLOCKS, 5) != first
    assert not mask.is_due(5)
    assert not any(measured(DepthByCost(seconds=SECONDS)).is_due(step) for step in range(100))


def test_times_of_blocks_add_up_from_each_block_on() -> None:
    assert suffix_sums([1.0, 2.0, 4.0]) == [7.0, 6.0, 4.0]


@settings(deadline=None, max_examples=20)  # the first one compiles
@given(st.floats(0.001, 1000), st.integers(0, 50), st.integers(0, 2**31))
def test_what_is_saved_draws_the_same_cuts_whatever_was_measured_anew(factor: float, steps: int, seed: int) -> None:
    mask = measured(DepthByCost(seconds=SECONDS, seed=seed))
    other = DepthByCost(seconds=[t**2 * factor for t in SECONDS], seed=seed)
    other.check(LAYOUT)
    other.load_state_dict(mask.state_dict())
    assert drawn(other, steps) == drawn(mask, steps)
    assert other.probabilities(BLOCKS, 0) == mask.probabilities(BLOCKS, 0)


def test_what_was_saved_before_the_first_refresh_leaves_times_that_were_given() -> None:
    before, other = DepthByCost(), DepthByCost(seconds=SECONDS)
    before.check(LAYOUT)
    other.check(LAYOUT)
    state = before.state_dict()
    assert int(state.pop("chosen_at")) == -1
    assert all(t.shape == (BLOCKS,) and t.dtype == torch.float64 for t in state.values())
    other.load_state_dict(before.state_dict())
    assert (other.seconds, other.masses) == (SECONDS, None)
    assert other.is_due(3)


def test_without_times_or_scores_there_is_no_plan() -> None:
    with pytest.raises(RuntimeError, match=r"no times yet: set mask\.seconds"):
        DepthByCost().plan(LAYOUT, 0)
    with pytest.raises(RuntimeError, match=r"no scores yet: call SparseSAM\.refresh"):
        DepthByCost(seconds=SECONDS).plan(LAYOUT, 0)


def test_a_range_without_any_fisher_mass_is_refused_and_leaves_what_was() -> None:
    mask = measured(DepthByCost((0.5, 1.0), seconds=SECONDS))
    masses = mask.masses
    dead = {name: s * (int(name[0]) < 4) for name, s in fisher(1).items()}
    with pytest.raises(ValueError, match="Fisher mass of the weights from block 4 on is 0"):
        mask.refresh(LAYOUT, {"fisher": dead}, ALONE, 1)
    with pytest.raises(FloatingPointError, match=r"scores of 2\.bias"):
        mask.refresh(LAYOUT, {"fisher": fisher(1) | {"2.bias": torch.full((3,), math.inf)}}, ALONE, 1)
    assert (mask.masses, mask.chosen_at) == (masses, 0)


def test_what_cannot_be_is_said_in_a_line() -> None:
    with pytest.raises(ValueError, match=r"cut is \(0\.6, 0\.4\)"):
        Depth((0.6, 0.4))
    with pytest.raises(ValueError, match=r"cut is \(0\.0, 1\.5\)"):
        AnnealedCut((0.0, 0.5), (0.0, 1.5), 10)
    with pytest.raises(ValueError, match="steps is 0; at least 1"):
        AnnealedCut((0.0, 0.5), (0.5, 1.0), 0)
    with pytest.raises(ValueError, match=r"one of the seconds of an ascent is 0\.0"):
        DepthByCost(seconds=[1.0, 0.0])
    with pytest.raises(ValueError, match="every is 0"):
        DepthByCost(every=0)
    with pytest.raises(ValueError, match="there are 3 times of an ascent, and the model has 8 blocks"):
        DepthByCost(seconds=[1.0] * 3).check(LAYOUT)
    mask = DepthByCost()
    mask.check(LAYOUT)
    with pytest.raises(ValueError, match="there are 3 times of an ascent, and the model has 8 blocks"):
        mask.seconds = [1.0] * 3
    with pytest.raises(ValueError, match="the saved state has no fisher_mass, which a moving cut drawn by cost needs"):
        mask.load_state_dict({})
    with pytest.raises(ValueError, match="the saved fisher_mass is of 3 blocks, the model has 8"):
        mask.load_state_dict({name: t[:3] if t.ndim else t for name, t in mask.state_dict().items()})

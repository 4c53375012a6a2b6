"""The figures of a comparison: each against its definition, written another way."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssam_scale.tracking.compare.statistics import (
    Evaluation,
    fastest,
    frontier,
    holm,
    mean_sd,
    reached_by_all,
    seconds_to,
    top1_at,
    welch,
)

percents = st.floats(0.0, 100.0)
p_values = st.lists(st.floats(0.0, 1.0), max_size=6)


@st.composite
def curves(draw: st.DrawFn) -> list[Evaluation]:
    """At least one evaluation, each later than the one before."""
    tops = draw(st.lists(percents, min_size=1, max_size=8))
    gaps = draw(st.lists(st.floats(0.5, 100.0), min_size=len(tops), max_size=len(tops)))
    return [Evaluation(sum(gaps[: i + 1]), i + 1, top1) for i, top1 in enumerate(tops)]


@given(p_values)
def test_holm_is_the_closed_test_of_bonferroni(values: list[float]) -> None:
    """A hypothesis is rejected if each set of hypotheses that it is in is, by Bonferroni's test of the set."""
    others = range(len(values))
    for index, corrected in enumerate(holm(values)):
        sets = [
            chosen for size in range(1, len(values) + 1) for chosen in combinations(others, size) if index in chosen
        ]
        expected = max(min(1.0, len(chosen) * min(values[i] for i in chosen)) for chosen in sets)
        assert corrected == pytest.approx(expected, rel=1e-12)


def test_holm_of_known_values() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


def test_welch_of_known_values() -> None:
    """t = −2 / √(4/3 + 2/2) and 2.882 degrees of freedom, by hand."""
    p = welch([80.0, 82.0, 84.0], [83.0, 85.0])
    from scipy.stats import t

    degrees = (4 / 3 + 1) ** 2 / ((4 / 3) ** 2 / 2 + 1**2 / 1)
    assert p == pytest.approx(2 * t.cdf(-2 / math.sqrt(4 / 3 + 1), degrees), rel=1e-9)
    assert welch([1.0, 1.0], [2.0, 2.0]) is None
    assert welch([1.0, 1.0], [2.0, 3.0]) is not None


values = st.lists(st.integers(0, 1000).map(lambda n: n / 10), min_size=2, max_size=6)


@given(values, values)
def test_welch_asks_only_for_the_difference(first: list[float], second: list[float]) -> None:
    p = welch(first, second)
    assert p is None or 0.0 <= p <= 1.0
    swapped, moved = welch(second, first), welch([x + 64 for x in first], [x + 64 for x in second])
    for other in (swapped, moved):
        assert (other is None) == (p is None)
        assert p is None or other == pytest.approx(p, rel=1e-6, abs=1e-9)  # differences of rounded sums


@given(curves(), percents, percents)
def test_a_higher_accuracy_never_takes_less_time(curve: list[Evaluation], one: float, other: float) -> None:
    low, high = (seconds_to(curve, accuracy) for accuracy in sorted((one, other)))
    assert high is None or (low is not None and low <= high)


@given(curves(), percents)
def test_at_the_time_to_an_accuracy_it_is_there(curve: list[Evaluation], accuracy: float) -> None:
    seconds = seconds_to(curve, accuracy)
    if seconds is None:
        assert max(each.top1 for each in curve) < accuracy
    else:
        at = top1_at(curve, seconds)
        assert at is not None
        assert at >= accuracy


@given(curves())
def test_accuracy_at_a_time_is_the_latest(curve: list[Evaluation]) -> None:
    assert top1_at(curve, 0.0) is None
    for each in curve:
        assert top1_at(curve, each.seconds) == each.top1
    assert top1_at(curve, math.inf) == curve[-1].top1


@given(st.lists(curves(), min_size=1, max_size=5))
def test_the_best_accuracy_that_all_reach(found: list[list[Evaluation]]) -> None:
    best = reached_by_all(found)
    assert best is not None
    assert all(seconds_to(curve, best) is not None for curve in found)
    assert any(seconds_to(curve, math.nextafter(best, math.inf)) is None for curve in found)
    assert reached_by_all([]) is reached_by_all([[]]) is None


def test_the_fastest_method_has_ended_with_all_its_seeds() -> None:
    slow, quick = [[Evaluation(100.0, 1, 1.0)], [Evaluation(104.0, 1, 1.0)]], [[Evaluation(80.0, 1, 1.0)]]
    assert fastest([slow, [*quick, [Evaluation(90.0, 1, 1.0)], []], [[]]]) == 90.0
    assert fastest([]) is fastest([[[]]]) is None


@given(st.lists(st.tuples(st.integers(0, 5).map(float), st.integers(0, 5).map(float)), max_size=8))
def test_the_frontier_is_what_nothing_beats(points: list[tuple[float, float]]) -> None:
    kept = frontier(points)
    assert kept == sorted(kept, key=lambda i: points[i])

    def beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
        return one != other and one[0] <= other[0] and one[1] >= other[1]

    for index, point in enumerate(points):
        assert (index in kept) != any(beats(other, point) for other in points)
        assert index in kept or any(beats(points[i], point) for i in kept)


def test_means_and_deviations() -> None:
    assert mean_sd([]) == (None, None)
    assert mean_sd([3.0]) == (3.0, None)
    assert mean_sd([1.0, 3.0]) == (2.0, pytest.approx(2**0.5))

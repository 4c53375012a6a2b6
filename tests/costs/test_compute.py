"""The cost model, on made-up times."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssam_scale.costs.compute import (
    PassTimes,
    StageTimes,
    StepShape,
    StepTimes,
    base_seconds,
    pass_seconds,
    predicted_ascent_seconds,
    predicted_over_base,
    suffix_share,
)

# Measured times are noisy: leaving a gradient out may seem to take longer than computing it.
seconds = st.floats(1e-3, 10.0)
stage = st.builds(StageTimes, seconds, seconds, seconds, seconds)
step_times = st.builds(
    StepTimes.proportional,
    st.lists(stage, min_size=2, max_size=8).map(tuple),
    st.floats(0.0, 1.0),
    st.floats(0.0, 1e-6),
)


def depth(times: StepTimes, cut: int, fraction: float = 1.0, perturbed: int = 0) -> StepShape:
    kept = tuple(float(i >= cut) for i in range(len(times.stages)))
    return StepShape(cut, kept, perturbed, fraction)


def nothing(times: StepTimes) -> StepShape:
    return StepShape(0, (0.0,) * len(times.stages), 0)


@given(step_times)
def test_no_ascent_costs_nothing_and_dense_sam_a_whole_pass(times: StepTimes) -> None:
    assert predicted_over_base(times, [nothing(times)]) == 1.0
    assert predicted_ascent_seconds(times, depth(times, 0)) == pytest.approx(pass_seconds(times))
    free = replace(times, optimizer=0.0, perturb=0.0)
    assert predicted_over_base(free, [depth(free, 0)]) == pytest.approx(2.0)


@given(step_times, st.floats(0.1, 0.9), st.integers(0, 2))
def test_a_descent_by_some_samples_spares_the_rest_and_pays_for_the_choice(
    times: StepTimes, share: float, forwards: int
) -> None:
    shape = replace(depth(times, 0), scores=forwards, descent=share)
    forward = sum(s.forward for s in times.stages)
    expected = share * pass_seconds(times) + forwards * forward
    assert predicted_ascent_seconds(times, shape) == pytest.approx(expected)


@given(step_times)
def test_what_lies_behind_a_later_cut_is_less(times: StepTimes) -> None:
    shares = [suffix_share(times, cut) for cut in range(len(times.stages) + 1)]
    assert shares[0] == 1.0
    assert shares[-1] == 0.0
    assert all(later < earlier for earlier, later in itertools.pairwise(shares))


@given(step_times, st.floats(0.1, 1.0), st.data())
def test_a_cut_costs_no_more_than_its_share_of_a_pass(times: StepTimes, fraction: float, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(times.stages) - 1))
    cost = predicted_ascent_seconds(times, depth(times, cut, fraction))
    whole = fraction * suffix_share(times, cut) * pass_seconds(times)
    # Nothing before the cut needs a gradient, so the cut's own block leaves that of its input out.
    saved = times.stages[cut].of_input if cut else 0.0
    assert cost == pytest.approx(whole - fraction * saved)
    assert 0.0 < cost <= whole * (1.0 + 1e-9)


@given(step_times, st.data())
def test_masks_save_the_gradients_they_leave_out_and_no_more(times: StepTimes, data: st.DataObject) -> None:
    count = len(times.stages)
    kept = tuple(data.draw(st.lists(st.floats(0.0, 1.0), min_size=count, max_size=count).filter(any)))
    forward = sum(s.forward for s in times.stages)
    cost = predicted_ascent_seconds(times, StepShape(0, kept, 0))
    assert forward <= cost <= pass_seconds(times) * (1.0 + 1e-9)
    more = tuple(min(1.0, share + 0.1) for share in kept)
    assert cost <= predicted_ascent_seconds(times, StepShape(0, more, 0)) * (1.0 + 1e-9)
    # The leading stages that nothing is perturbed of need no backward at all.
    first = next(i for i, share in enumerate(kept) if share)
    later = [s.backward for s in times.stages[first:]]
    assert cost <= (forward + sum(later)) * (1.0 + 1e-9)


@given(step_times, st.integers(1, 9), st.integers(0, 10**6))
def test_an_interval_spreads_the_cost_of_an_ascent(times: StepTimes, interval: int, perturbed: int) -> None:
    ascent = depth(times, 0, perturbed=perturbed)
    period = [ascent, *[nothing(times)] * (interval - 1)]
    extra = predicted_ascent_seconds(times, ascent) / base_seconds(times)
    assert predicted_over_base(times, period) == pytest.approx(1.0 + extra / interval)


SIZES = (2, 4, 8, 16, 32, 64)


def launching(fixed: float, each: float, sizes: tuple[int, ...] = SIZES) -> StepTimes:
    """Of a device on which every part takes `fixed` for its launches, and `each` for the arithmetic of an image."""
    passes = [(n, StageTimes(*(part * (fixed + each * n) for part in (1.0, 2.0, 1.0, 1.0)))) for n in sizes]
    return StepTimes(tuple(PassTimes(n, (stage, stage)) for n, stage in passes), 0.0, 0.0, images=sizes[-1])


@given(st.floats(0.01, 10.0), st.floats(0.01, 10.0), st.integers(2, 64))
def test_a_small_ascent_takes_its_launches_and_what_it_computes(fixed: float, each: float, images: int) -> None:
    times = launching(fixed, each)
    # Forwards of both stages; a backward of the second with the gradient of its input, of the first without.
    real = (1 + 1 + 2 + 1) * (fixed + each * images)
    predicted = predicted_ascent_seconds(times, depth(times, 0, images / 64))
    assert predicted == pytest.approx(real)
    in_proportion = predicted_ascent_seconds(StepTimes.proportional(times.stages), depth(times, 0, images / 64))
    assert in_proportion == pytest.approx(real - 5 * fixed * (1.0 - images / 64))
    # A descent by as few spares their arithmetic, and none of its launches.
    spared = real - predicted_ascent_seconds(times, replace(depth(times, 0, images / 64), descent=images / 64))
    assert spared == pytest.approx(5 * each * (64 - images), abs=1e-9 * real)


@given(st.integers(1, 200), st.integers(1, 8))
def test_between_measured_sizes_time_grows_and_beyond_them_it_is_bounded(images: int, micro_batches: int) -> None:
    """What launches hide, an ascent of few images has for nothing: a kink that no straight line goes through."""
    stages = {n: StageTimes(*(part * max(16.0, n) for part in (1.0, 2.0, 1.0, 1.0))) for n in SIZES}
    measured = tuple(PassTimes(n, (stage,)) for n, stage in stages.items())
    times = StepTimes(measured, 0.0, 0.0, images=images, micro_batches=micro_batches)
    [found] = times.stages
    assert found.backward == pytest.approx(2 * found.forward)
    if images in SIZES or images < 2:
        assert found.forward == pytest.approx(micro_batches * max(16.0, images))
    elif images > 64:
        assert found.forward == pytest.approx(micro_batches * images)
    else:
        below, above = (max(16.0, m(n for n in SIZES if c(n))) for m, c in ((max, images.__gt__), (min, images.__lt__)))
        assert micro_batches * below * (1 - 1e-9) <= found.forward <= micro_batches * above * (1 + 1e-9)


def test_an_ascent_sees_whole_images_and_one_at_least() -> None:
    times = replace(launching(1.0, 1.0), images=12)
    assert [times.images_in(share) for share in (1.0, 0.5, 0.125, 0.01)] == [12, 6, 1, 1]
    assert replace(times, images=12.5).images_in(1.0) == 12.5


def test_what_is_frozen_costs_its_forward_and_what_is_sent_through_it() -> None:
    stages = (StageTimes(1.0, 2.0, 1.2, 1.5), StageTimes(1.0, 2.0, 1.0, 1.0), StageTimes(1.0, 3.0, 2.0, 1.5))
    times = StepTimes.proportional(stages)
    assert pass_seconds(replace(times, trained=(1.0, 1.0, 1.0))) == pass_seconds(times)
    # Nothing goes back into a frozen beginning, and the stage behind it needs no gradient of its input.
    assert pass_seconds(replace(times, trained=(0.0, 0.5, 1.0))) == pytest.approx(3.0 + 3.0 + (2.0 - 0.5 - 1.0))
    # Through one in between it does, without the gradients of its weights.
    assert pass_seconds(replace(times, trained=(1.0, 0.0, 1.0))) == pytest.approx(3.0 + 3.0 + 1.0 + (2.0 - 0.5))
    assert suffix_share(replace(times, trained=(0.0, 0.0, 1.0)), 1) == pytest.approx((1.0 + 1.0 + 1.5) / 4.5)


def test_an_example_by_hand() -> None:
    stages = (StageTimes(1.0, 2.0, 1.2, 1.5), StageTimes(1.0, 2.0, 1.0, 1.0))
    times = StepTimes.proportional(stages, optimizer=0.5, perturb=0.01)
    assert pass_seconds(times) == 5.5  # the images' gradient, 0.5, is never computed
    assert base_seconds(times) == 6.0
    assert suffix_share(times, 1) == pytest.approx(3.0 / 5.5)
    # The second stage alone, on half of the batch: 1 + 2 − 1, halved, and ten weights.
    assert predicted_ascent_seconds(times, StepShape(1, (0.0, 1.0), 10, 0.5)) == pytest.approx(1.1)
    # A quarter of the second stage's weights, and no cut: both forwards, 2 − 0.75 − 1 of backward.
    assert predicted_ascent_seconds(times, StepShape(0, (0.0, 0.25), 10)) == pytest.approx(2.0 + 0.25 + 0.1)
    # Half of the first stage's weights: it needs no input gradient, the second no weights'.
    assert predicted_ascent_seconds(times, StepShape(0, (0.5, 0.0), 0)) == pytest.approx(
        2.0 + (2.0 - 0.4 - 0.5) + (2.0 - 1.0)
    )

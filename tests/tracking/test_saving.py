"""The saving of a run from its probes: arithmetic, intervals, and what another program on the machine does to it."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from ssam_scale.tracking.saving import FEWEST, Probe, Saving, order_of
from ssam_scale.tracking.timer import PhaseSummary


def window(kinds: dict[str, int], *, optimizer: float = 0.0, data: float = 0.0) -> PhaseSummary:
    """Steps of each kind, whose times do not matter, and the mean time of two phases."""
    by_kind = {kind: PhaseSummary({}, (1.0,) * count) for kind, count in kinds.items()}
    return PhaseSummary({"optimizer": optimizer, "data": data}, (1.0,) * sum(kinds.values()), by_kind)


def saving_of(
    probes: list[Probe], *windows: PhaseSummary, method: str = "ssam-depth", dense: bool = False, gpus: int = 0
) -> dict[str, float]:
    saving = Saving(method, dense=dense, gpus=gpus)
    for probe in probes:
        saving.add(probe)
    for each in windows:
        saving.count(each)
    return saving.metrics()


def test_what_was_saved_is_what_dense_sam_would_have_taken_more() -> None:
    found = saving_of([Probe(base=1.0, dense=2.0, own=1.5)], window({"sparse": 100}, optimizer=0.25))
    assert found["saving/seconds_so_far"] == pytest.approx(100 * 0.5)
    assert found["saving/vs_dense_percent"] == pytest.approx(100 * 0.5 / 2.25)
    assert found["overhead/vs_base_percent"] == pytest.approx(100 * (1.75 / 1.25 - 1))


def test_steps_count_as_what_they_were() -> None:
    """An interval of four and now and then a dense ascent: only those with an own ascent cost an own step."""
    probes = [Probe(1.0, 2.0, 1.6)]
    kinds = {"sparse": 20, "calibrating": 5, "base": 50, "reused": 25}
    mine = (20 * 1.6 + 5 * 2.0 + 75 * 1.0) / 100
    found = saving_of(probes, window(kinds))
    assert found["saving/seconds_so_far"] == pytest.approx(100 * (2.0 - mine))
    assert found["overhead/vs_base_percent"] == pytest.approx(100 * (mine - 1.0))


def test_steps_whose_own_ascent_is_dense_are_own_steps() -> None:
    """As with the papers' norm, which needs the whole gradient."""
    found = saving_of([Probe(1.0, 2.0, 2.1)], window({"dense": 10}))
    assert found["overhead/vs_base_percent"] == pytest.approx(110.0)
    assert found["saving/seconds_so_far"] == pytest.approx(-1.0)


def test_dense_sam_saves_nothing_and_knows_what_it_costs() -> None:
    found = saving_of([Probe(1.0, 2.0, 2.1)] * 4, window({"dense": 10}), method="sam", dense=True)
    assert found["saving/vs_dense_percent"] == found["saving/vs_dense_percent_low"] == 0.0
    assert found["overhead/vs_base_percent"] == pytest.approx(100.0)


def test_dense_sam_now_and_then_saves_the_steps_without_it() -> None:
    found = saving_of([Probe(1.0, 2.0, 2.1)], window({"dense": 10, "base": 30}), method="sam", dense=True)
    assert found["saving/seconds_so_far"] == pytest.approx(30.0)


def test_dense_sam_on_a_part_of_the_batch_saves() -> None:
    """It is called `sam` too."""
    found = saving_of([Probe(1.0, 2.0, 1.5)], window({"dense": 10}), method="sam")
    assert found["saving/seconds_so_far"] == pytest.approx(5.0)


def test_what_the_loader_is_waited_for_is_no_saving() -> None:
    """Dense SAM's longer step would have hidden as much of it."""
    probes = [Probe(1.0, 2.0, 1.5)]
    assert saving_of(probes, window({"sparse": 10}, data=0.2))["saving/seconds_so_far"] == pytest.approx(10 * 0.3)
    assert saving_of(probes, window({"sparse": 10}, data=0.7))["saving/vs_dense_percent"] == 0.0


def test_choosing_masks_counts() -> None:
    saving = Saving("ssam-element")
    saving.add(Probe(1.0, 2.0, 1.8))
    saving.count(window({"sparse": 10}))
    saving.refreshes = 5.0
    found = saving.metrics()
    assert found["saving/seconds_so_far"] == pytest.approx(10 * 0.2 - 5.0)
    assert found["overhead/vs_base_percent"] == pytest.approx(100 * (1.8 + 0.5 - 1.0))


def test_nothing_is_said_before_something_is_known() -> None:
    assert saving_of([], window({"sparse": 10})) == {}
    assert saving_of([Probe(1.0, 2.0, 1.5)]) == {}
    few = saving_of([Probe(1.0, 2.0, 1.5)] * (FEWEST - 1), window({"sparse": 1}))
    assert not [name for name in few if name.endswith(("_low", "_high"))]


def test_the_base_optimizer_costs_nothing_over_itself() -> None:
    assert saving_of([], window({"base": 10}), method="base") == {"overhead/vs_base_percent": 0.0}


def test_gpu_hours_are_those_of_all_gpus() -> None:
    found = saving_of([Probe(1.0, 2.0, 1.0)], window({"base": 3600}), gpus=8)
    assert found["saving/gpu_hours_so_far"] == pytest.approx(8.0)


def test_seconds_of_before_a_resume_count() -> None:
    saving = Saving("ssam-depth")
    saving.before = 30.0
    saving.add(Probe(1.0, 2.0, 1.5))
    saving.count(window({"sparse": 10}))
    assert saving.metrics()["saving/seconds_so_far"] == pytest.approx(35.0)


def drawn(count: int, *, seed: int, load: float = 0.0) -> list[Probe]:
    """Probes of a moving cut on a machine where another program slows down whole probes by up to `load` times more."""
    rng = np.random.default_rng(seed)
    cuts = rng.uniform(1.0, 2.0, count)
    slow = 1.0 + load * rng.uniform(0.0, 1.0, count)
    noise = rng.normal(1.0, 0.02, (count, 3))
    return [Probe(*(np.array([1.0, 2.0, cut]) * s * n)) for cut, s, n in zip(cuts, slow, noise, strict=True)]


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    """Of 95%, bootstrapped from 20 probes: between 85 and 100 of 100, as small samples make intervals a bit short."""
    held = 0
    for seed in range(100):
        found = saving_of(drawn(20, seed=seed), window({"sparse": 10}))
        held += found["saving/vs_dense_percent_low"] <= 25.0 <= found["saving/vs_dense_percent_high"]
    assert 85 <= held <= 100


def test_intervals_of_many_probes_are_bounded_now_and_then_and_do_not_take_more_and_more() -> None:
    saving = Saving("ssam-depth")
    saving.count(window({"sparse": 10}))
    bounded = []
    for number, probe in enumerate(drawn(400, seed=5), 1):
        saving.add(probe)
        if "saving/vs_dense_percent_low" in saving.metrics(intervals=saving.interval_is_due):
            bounded.append(number)
    assert bounded[:10] == [*range(FEWEST, FEWEST + 10)]
    assert all(later <= 1.05 * one + 1 for one, later in pairwise([*bounded, 400]))
    assert len(bounded) < 90
    assert "saving/vs_dense_percent_low" in saving.metrics(), "at the end there is one, of all"


def test_another_program_on_the_machine_moves_times_and_not_the_saving() -> None:
    quiet, loaded = (saving_of(drawn(40, seed=3, load=load), window({"sparse": 10})) for load in (0.0, 2.0))
    assert loaded["saving/seconds_so_far"] > 1.5 * quiet["saving/seconds_so_far"]
    low, high = (loaded[f"saving/vs_dense_percent_{bound}"] for bound in ("low", "high"))
    assert low <= quiet["saving/vs_dense_percent"] <= high


def test_the_order_is_random_and_the_same_everywhere() -> None:
    orders = [tuple(order_of(1, step, "abc")) for step in range(60)]
    assert orders == [tuple(order_of(1, step, "abc")) for step in range(60)]
    assert len(set(orders)) == 6

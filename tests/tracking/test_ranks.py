"""Processes side by side: what each measured, and which one the others wait for."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssam_scale.sharding import World
from ssam_scale.tracking.ranks import Measured, Ranks, straggler_of, waiting
from ssam_scale.tracking.timer import PHASES, PhaseSummary
from tests.support.ranks import run_ranks

NAN = math.nan


def measured(forward: float, *, data: float = 0.1, step: float = 1.0, **more: float) -> Measured:
    summary = PhaseSummary({"data": data, "descent forward": forward}, (step,) * 2)
    return replace(Measured.of(summary, 2.0, NAN, NAN), **more)


def test_the_slowest_is_named_with_what_the_others_wait() -> None:
    ranks = Ranks(["a", "a", "b"])
    found = ranks.metrics([measured(0.2), measured(0.2), measured(0.5)], images=64)
    assert found["ranks/slowest"] == 2
    assert found["ranks/waited_percent"] == pytest.approx(30.0)
    assert [found[f"ranks/descent_forward/{which}"] for which in ("min", "mean", "max")] == pytest.approx(
        [0.2, 0.3, 0.5]
    )
    assert not [name for name in found if "backward" in name or "memory" in name or "energy" in name]


def test_a_straggler_is_told_once_and_only_if_it_lasts() -> None:
    ranks = Ranks(["a", "b"])
    told = []
    for forward in (0.5, 0.2, 0.5, 0.5, 0.5, 0.5):
        ranks.metrics([measured(0.2), measured(forward)], images=1, steps=40)
        told.append(ranks.news())
    line = "rank 1 (node b) is slow: in 120 steps its own work (data loading, forward passes) took more than 1.5 times"
    assert told == [None, None, None, None, f"{line} the others'", None]
    assert ranks.straggler() == "rank 1 (b): the others wait for it for 30% of each step"


def test_where_forwards_wait_for_others_a_straggler_is_known_by_its_data() -> None:
    for gathers, told in ((True, True), (False, False)):
        ranks = Ranks(["a", "b"], gathers=gathers)
        ranks.metrics([measured(0.7, data=0.1), measured(0.4, data=0.4)], images=1, steps=100)
        assert (ranks.news() is not None) == told


@pytest.mark.parametrize(
    ("own", "straggler"),
    [
        ([1.0, 1.0, 1.6], 2),
        ([1.0, 1.0, 1.5], None),
        ([1.6, 1.0], 0),
        ([2.0, 2.0, 1.0, 1.0], 0),
        ([0.01, 0.01, 0.02], None),
        ([1.0], None),
    ],
    ids=["above", "at the limit", "two", "half of them", "too little of a step", "alone"],
)
def test_a_straggler_takes_more_than_one_and_a_half_medians(own: list[float], straggler: int | None) -> None:
    assert straggler_of(own, 4.0) == straggler


@pytest.mark.parametrize("forward", [[0.21, 0.2], [0.5, 0.2] * 3, []], ids=["hardly", "in turn", "no window"])
def test_there_is_none(forward: list[float]) -> None:
    """Below 5% of a step, or another process each time."""
    ranks = Ranks(["a", "b"])
    for turn, seconds in enumerate(forward):
        pair = [measured(seconds), measured(0.2)]
        ranks.metrics(pair if turn % 4 < 2 else pair[::-1], images=1)
    assert ranks.straggler() is None
    assert ranks.news() is None


def test_a_process_alone_waits_for_nobody() -> None:
    ranks = Ranks(["a"])
    found = ranks.metrics([measured(0.2, peak_bytes=2.0**31, joules=300.0)], images=100)
    assert found == {
        "memory/peak_gib": 2.0,
        "energy/joules_per_image": 3.0,
        "energy/kwh_so_far": pytest.approx(300 / 3.6e6),
    }
    assert ranks.straggler() is None


def test_energy_is_known_if_every_gpu_tells_it() -> None:
    ranks = Ranks(["a", "b"])
    half = [measured(0.2, joules=300.0, peak_bytes=2.0**30), measured(0.2, peak_bytes=2.0**31)]
    found = ranks.metrics(half, images=1)
    assert found["memory/peak_gib"] == 2.0
    assert not [name for name in found if name.startswith("energy")]


@given(st.lists(st.floats(0.0, 10.0), min_size=2, max_size=9))
def test_who_is_slowest_is_waited_for_longest(seconds: list[float]) -> None:
    everyone = [measured(s, step=20.0) for s in seconds]
    slowest, waited = waiting(everyone)
    assert seconds[slowest] == max(seconds)
    assert waited + 1e-12 >= 0.0
    assert waited <= (max(seconds) - min(seconds)) / 20.0 + 1e-12


def exchange(world: World) -> Any:
    mine = Measured.of(PhaseSummary({"data": 1.0 + world.rank}, (2.0,)), world.rank, 2.0**40 + 1, NAN)
    return world.gather(mine.packed()), world.hosts(), world.first_says(f"of rank {world.rank}")


def test_processes_tell_each_other() -> None:
    """In float64: bytes of memory are no float32."""
    results = run_ranks(2, exchange)
    for rows, hosts, said in results:
        first, second = (Measured.unpacked(row) for row in rows)
        assert (first.loss, second.loss) == (0.0, 1.0)
        assert second.phases[PHASES.index("data")] == 2.0
        assert first.peak_bytes == 2.0**40 + 1
        assert math.isnan(first.joules)
        assert len(hosts) == 2
        assert hosts[0] == hosts[1]
        assert said == "of rank 0"

from __future__ import annotations

import contextlib
import math
import time

import pytest

from ssam_scale.clock import CudaClock, HostClock
from ssam_scale.tracking.timer import PHASES, PhaseSummary, PhaseTimer


class Clock:
    """A clock that the test moves, in whole seconds: sums and differences are exact."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def run_step(timer: PhaseTimer, clock: Clock, **seconds: float) -> None:
    for name, duration in seconds.items():
        with timer(name.replace("_", " ")):  # type: ignore[arg-type]
            clock.now += duration
    timer.step("base")


def test_phase_names_are_those_of_the_metrics() -> None:
    assert PHASES == (
        "data",
        "reference",
        "ascent forward",
        "ascent backward",
        "perturb",
        "descent forward",
        "descent backward",
        "optimizer",
    )


def test_means_over_steps_and_median_of_steps() -> None:
    clock = Clock()
    timer = PhaseTimer(clock=HostClock(clock))
    run_step(timer, clock, data=1, descent_forward=2)
    run_step(timer, clock, data=3, descent_forward=2)
    run_step(timer, clock, data=20, descent_forward=2, optimizer=6)
    summary = timer.drain()
    assert summary.phases == {"data": 8.0, "descent forward": 2.0, "optimizer": 2.0}
    assert summary.step_times == (3.0, 5.0, 28.0)
    assert (summary.step, summary.steps, summary.seconds) == (5.0, 3, 36.0)


def test_each_kind_of_step_is_summed_up_by_itself() -> None:
    clock = Clock()
    timer = PhaseTimer(clock=HostClock(clock))
    for kind, seconds in (("sparse", 4), ("base", 1), ("sparse", 6), ("base", 3), ("base", 5)):
        with timer("data"):
            clock.now += 1
        if kind == "sparse":
            with timer("perturb"):
                clock.now += 2
        with timer("optimizer"):
            clock.now += seconds
        timer.step(kind)  # type: ignore[arg-type]
    summary = timer.drain()
    assert summary.step_times == (7.0, 2.0, 9.0, 4.0, 6.0)
    assert summary.phases == {"data": 1.0, "perturb": 0.8, "optimizer": 3.8}
    assert summary.by_kind == {
        "sparse": PhaseSummary({"data": 1.0, "perturb": 2.0, "optimizer": 5.0}, (7.0, 9.0)),
        "base": PhaseSummary({"data": 1.0, "optimizer": 3.0}, (2.0, 4.0, 6.0)),
    }
    assert timer.drain().by_kind == {}


def test_occurrences_within_a_step_add_up() -> None:
    clock = Clock()
    timer = PhaseTimer(clock=HostClock(clock))
    for _ in range(4):
        with timer("descent forward"):
            clock.now += 2
        with timer("descent backward"):
            clock.now += 3
    timer.step("base")
    assert timer.drain().phases == {"descent forward": 8.0, "descent backward": 12.0}


def test_a_step_includes_gaps_between_phases_but_not_between_steps() -> None:
    clock = Clock()
    timer = PhaseTimer(clock=HostClock(clock))
    with timer("data"):
        clock.now += 1
    clock.now += 5
    with timer("optimizer"):
        clock.now += 1
    timer.step("base")
    clock.now += 1000  # an evaluation
    run_step(timer, clock, data=2)
    assert timer.drain().step_times == (7.0, 2.0)


def test_drain_forgets_what_it_returned_and_keeps_the_step_under_way() -> None:
    clock = Clock()
    timer = PhaseTimer(clock=HostClock(clock))
    run_step(timer, clock, data=1)
    with timer("data"):
        clock.now += 4
    assert timer.drain().step_times == (1.0,)
    assert timer.drain().steps == 0
    with timer("optimizer"):
        clock.now += 1
    timer.step("base")
    assert timer.drain().step_times == (5.0,)


def test_summary_of_no_steps() -> None:
    summary = PhaseTimer().drain(wait=True)
    assert (summary.phases, summary.steps, summary.seconds) == ({}, 0, 0.0)
    assert math.isnan(summary.step)


def test_misuse_is_an_error_and_leaves_the_timer_usable() -> None:
    clock = Clock()
    timer = PhaseTimer(clock=HostClock(clock))
    with pytest.raises(ValueError, match="no phase 'forward'; phases are data, "):
        timer("forward")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="without a phase"):
        timer.step("base")
    with pytest.raises(ValueError, match="'perturb' begins inside phase 'data'"), timer("data"), timer("perturb"):
        pass
    with pytest.raises(ValueError, match="ends inside phase 'data'"), timer("data"):
        timer.step("base")
    with contextlib.suppress(RuntimeError), timer("data"):
        clock.now += 1
        raise RuntimeError("loader")
    timer.step("base")
    assert timer.drain().step_times == (1.0,)


class Stream:
    """A device that runs behind the host: events are reached when the test lets it run."""

    def __init__(self) -> None:
        self.enqueued: list[Event] = []
        self.clock = Clock()
        self.created = 0
        self.waited = 0

    def event(self) -> Event:
        self.created += 1
        return Event(self)

    def run(self, number: int) -> None:
        for event in self.enqueued[:number]:
            event.reached = self.clock.now
            self.clock.now += 2  # the work between two events
        del self.enqueued[:number]


class Event:
    def __init__(self, stream: Stream) -> None:
        self.stream, self.reached = stream, math.nan

    def record(self) -> None:
        self.reached = math.nan
        self.stream.enqueued.append(self)

    def query(self) -> bool:
        return not math.isnan(self.reached)

    def synchronize(self) -> None:
        self.stream.waited += 1
        self.stream.run(self.stream.enqueued.index(self) + 1)

    def elapsed_time(self, end: Event) -> float:
        assert self.query()
        assert end.query()
        return 1000 * (end.reached - self.reached)  # CUDA's unit is the millisecond


def test_events_are_read_only_where_the_device_has_passed_and_never_waited_for() -> None:
    stream = Stream()
    timer = PhaseTimer(clock=CudaClock(stream.event))
    for _ in range(3):
        for name in ("data", "optimizer"):
            with timer(name):  # type: ignore[arg-type]
                pass
        timer.step("base")
    assert timer.drain().steps == 0
    stream.run(7)  # 4 events of phases and 1 of the end: the first step and a part of the second
    summary = timer.drain()
    assert summary.phases == {"data": 2.0, "optimizer": 2.0}
    assert summary.step_times == (8.0,)
    assert stream.waited == 0
    assert timer.drain(wait=True).step_times == (8.0, 8.0)
    assert stream.waited == 1


def test_events_are_reused() -> None:
    stream = Stream()
    timer = PhaseTimer(clock=CudaClock(stream.event))
    for _ in range(10):
        with timer("data"):
            pass
        timer.step("base")
        timer.drain(wait=True)
    assert stream.created == 3


def test_agrees_with_an_independent_clock() -> None:
    """What a phase measures lies between a clock read inside and one read around it, whatever the machine's speed."""

    def now() -> float:
        return time.clock_gettime(time.CLOCK_MONOTONIC_RAW)

    timer = PhaseTimer()
    inside = 0.0
    begin = now()
    for _ in range(20):
        with timer("descent forward"):
            entered = now()
            sum(range(20_000))
            inside += now() - entered
        timer.step("base")
    around = now() - begin
    summary = timer.drain()
    # The timer's clock is steered by NTP, by at most 500 ppm; the raw one is not.
    assert inside * (1 - 1e-3) <= 20 * summary.phases["descent forward"] <= around * (1 + 1e-3)
    assert 20 * summary.phases["descent forward"] <= summary.seconds <= around * (1 + 1e-3)


@pytest.mark.gpu
def test_cuda_events_cover_the_kernel_and_not_the_launch() -> None:
    import torch

    torch.cuda._sleep(1000)  # the context and the first launch take long and are not what is timed
    torch.cuda.synchronize()
    timer = PhaseTimer("cuda")
    begin = time.perf_counter()
    with timer("descent forward"):
        torch.cuda._sleep(50_000_000)
    timer.step("base")
    launched = time.perf_counter() - begin
    torch.cuda.synchronize()
    done = time.perf_counter() - begin
    summary = timer.drain()
    assert summary.steps == 1
    assert launched < summary.step <= done

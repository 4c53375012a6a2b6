"""Both ways of timing a device's work see all of it."""

from __future__ import annotations

import math
import time

import pytest
import torch

from ssam_scale.clock import HostClock, clock_of, timed

PAUSE_S = 0.02


def test_on_the_host() -> None:
    clock = clock_of(torch.device("cpu"))
    assert isinstance(clock, HostClock)
    with timed(torch.device("cpu")) as block:
        start = clock.mark()
        time.sleep(PAUSE_S)
        end = clock.mark()
        assert math.isnan(block.seconds)
    assert clock.passed(end)
    assert PAUSE_S <= clock.seconds(start, end) <= block.seconds


@pytest.mark.gpu
def test_on_a_gpu_that_the_host_runs_ahead_of() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    clock, matrix = clock_of(device), torch.randn(8192, 8192, device=device)

    def work() -> None:
        for _ in range(20):
            torch.mm(matrix, matrix)

    work()  # chooses its kernels
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    started = time.perf_counter()
    first.record()
    start = clock.mark()
    work()
    end = clock.mark()
    last.record()
    launched = time.perf_counter() - started
    assert not clock.passed(end)
    clock.wait(end)
    assert clock.passed(end)
    assert launched < clock.seconds(start, end)
    last.synchronize()
    # Nothing lies between the marks and the events but what the device is doing for others at that moment.
    assert clock.seconds(start, end) == pytest.approx(first.elapsed_time(last) / 1e3, rel=0.2)
    clock.release([start, end])
    assert clock.mark() in (start, end)

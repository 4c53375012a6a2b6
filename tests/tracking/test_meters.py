"""Peaks of memory and energy, where a device tells them."""

from __future__ import annotations

import math

import pytest
import torch

from ssam_scale.tracking.meters import EnergyMeter, forget_peak, peak_bytes


def test_a_cpu_tells_no_energy_and_the_most_memory_ever() -> None:
    cpu = torch.device("cpu")
    meter = EnergyMeter(cpu)
    meter.begin()
    assert math.isnan(meter.joules())
    before = peak_bytes(cpu)
    held = torch.ones(2**24)
    del held
    forget_peak(cpu)
    assert 2**26 < before <= peak_bytes(cpu)


@pytest.mark.gpu
def test_a_gpu_tells_both() -> None:
    gpu = torch.device("cuda")
    meter = EnergyMeter(gpu)
    forget_peak(gpu)
    before = peak_bytes(gpu)
    meter.begin()
    x = torch.ones(4096, 4096, device=gpu)
    for _ in range(200):
        x = x @ x / 4096
    torch.cuda.synchronize()
    assert peak_bytes(gpu) >= before + x.nbytes
    joules = meter.joules()
    assert math.isnan(joules) or joules >= 0.0  # not of a part of a card, nor of one before Volta

"""The time of a step by plan, next to the base optimizer's, and what the cost model predicts from the parts.

All in one process and in turns: each round takes the steps of every plan, one plan after the other, and measures the
parts. What slows the machine down for a while so slows all of them.
"""

from __future__ import annotations

import copy
import dataclasses
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ssam_scale.clock import timed
from ssam_scale.costs.compute import StepShape, base_seconds, predicted_over_base, suffix_share
from ssam_scale.costs.profile import Parts
from ssam_scale.perturbation import StagedModel
from ssam_scale.tracking.environment import hardware_tags, versions

from .networks import Setting
from .scenarios import Running, Scenario, sgd

_VERSIONS = ("python", "ssam_scale", "torch", "timm")
Kind = tuple[int, bool]  # of a step: its cut, and whether it has an ascent


class _Steps:
    """Takes and times the steps of one scenario."""

    def __init__(self, scenario: Scenario, setting: Setting, network: StagedModel) -> None:
        self.scenario = scenario
        self._device = setting.device
        self.running = Running(scenario, setting, network)
        self.shapes: list[StepShape] = []
        self._seconds: list[float] = []

    def take(self, *, count: bool) -> None:
        """The steps of one round."""
        for _ in range(self.scenario.steps):
            shape = self.running.shape()
            with timed(self._device) as step:
                self.running.step()
            if count:
                self._seconds.append(step.seconds)
                self.shapes.append(shape)

    @property
    def seconds(self) -> float:
        """Of a step: the median over steps of one kind, and the mean of these as often as each kind came."""
        return typical([(s.cut, s.ascends) for s in self.shapes], self._seconds)

    @property
    def rounds(self) -> np.ndarray:
        """Mean seconds of a step in each round."""
        return np.array(self._seconds).reshape(-1, self.scenario.steps).mean(1)


def typical(kinds: Sequence[Kind], seconds: Sequence[float]) -> float:
    """The median over steps of one kind, and the mean of these medians, weighted by how often each kind came."""
    by_kind: dict[Kind, list[float]] = {}
    for kind, value in zip(kinds, seconds, strict=True):
        by_kind.setdefault(kind, []).append(value)
    often = Counter(kinds)
    return sum(often[kind] * statistics.median(values) for kind, values in by_kind.items()) / len(kinds)


def interquartile_range(values: np.ndarray) -> float:
    """The distance between the quartiles."""
    low, high = np.percentile(values, [25, 75])
    return float(high - low)


def bench_steps(setting: Setting, repeats: int, compared: Sequence[Scenario]) -> list[dict[str, Any]]:
    """Rows of the time of a step, one a plan.

    `seconds` of a step is the median over `repeats` rounds; where a plan's steps differ (an ascent or none, another
    cut) the median over steps of one kind, and the mean of these as often as each came. `time_over_base` is their ratio
    to the base optimizer's, `time_over_base_iqr` the interquartile range of the ratio over rounds, in each of which the
    two were taken shortly after each other. `density` and `suffix_share` (t: the perturbed suffix's share of a pass's
    measured time, forward and backward) are means over the steps, a step without an ascent counting 0.
    `predicted_over_base` comes from the measured parts alone (`costs.compute`), which the row of the base optimizer
    lists; `target_over_base` is the most that we want.

    Args:
        setting: on what; one that `Setting.check` finds nothing wrong with.
        repeats: rounds, after one that warms up.
        compared: the plans, the base optimizer first.
    """
    network = setting.network()
    copied = copy.deepcopy(network)
    parts = Parts(setting, copied, setting.batch(), sgd(copied))
    each = [_Steps(scenario, setting, copy.deepcopy(network)) for scenario in compared]
    for done in range(repeats + 1):
        for steps in each:
            steps.take(count=done > 0)
        parts.measure()
    times, base = parts.medians(), each[0]
    common = environment(setting, repeats)
    rows = []
    for steps in each:
        scenario, shapes = steps.scenario, steps.shapes
        t = statistics.fmean(suffix_share(times, s.cut) if s.ascends else 0.0 for s in shapes)
        rows.append(
            {
                "model": setting.model,
                "plan": scenario.name,
                "density": statistics.fmean(s.perturbed for s in shapes) / steps.running.weights,
                "suffix_share": t,
                "fraction": scenario.fraction,
                "interval": scenario.interval,
                "steps": len(shapes),
                "seconds": steps.seconds,
                "seconds_iqr": interquartile_range(steps.rounds),
                "time_over_base": steps.seconds / base.seconds,
                "time_over_base_iqr": interquartile_range(steps.rounds / base.rounds),
                "predicted_over_base": predicted_over_base(times, shapes) if scenario.mask or steps is base else None,
                "target_over_base": scenario.target(t),
                **common,
            }
        )
    rows[0]["parts"] = {**dataclasses.asdict(times), "base": base_seconds(times)}
    return rows


def environment(setting: Setting, repeats: int) -> dict[str, Any]:
    """What belongs to every row: on what and where."""
    known = versions()
    return {
        "resolution": setting.resolution,
        "batch_size": setting.batch_size,
        "precision": setting.precision,
        "repeats": repeats,
        "device": torch.cuda.get_device_name(setting.device) if setting.device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "hardware": hardware_tags()["hardware"],
        "versions": {name: known[name] for name in _VERSIONS if name in known},
    }

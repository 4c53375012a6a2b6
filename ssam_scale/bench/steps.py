"""The time of a step by plan, next to the base optimizer's, and what the cost model predicts from the parts.

All in one process and in turns: each round takes the steps of every plan, one plan after the other, and measures the
parts. What slows the machine down for a while so slows all of them.
"""

from __future__ import annotations

import copy
import dataclasses
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssam_scale.perturbation import SparseSAM, StagedModel
from ssam_scale.tracking.environment import hardware_tags, versions

from .networks import Setting
from .plans import Running, Way, sgd
from .predict import StageTimes, StepShape, StepTimes, base_seconds, predicted_over_base, suffix_share

_VERSIONS = ("python", "ssam_scale", "torch", "timm")
# What the backward of a stage computes.
_BOTH, _NO_WEIGHTS, _NO_INPUT = "both", "no weights", "no input"

Kind = tuple[int, bool]  # of a step: its cut, and whether it has an ascent


class _Clock:
    """Times of a device: of its own work on a GPU, where the host runs ahead; else of the host."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"

    def now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()

    def seconds(self, start: Any, end: Any) -> float:
        """Between two times, after `wait`."""
        return float(start.elapsed_time(end)) / 1e3 if self._cuda else end - start


class _Parts:
    """Measures the parts of a step on a copy of the network.

    Args:
        setting: on what.
        network: the setting's, and nobody else's.
    """

    def __init__(self, setting: Setting, network: StagedModel) -> None:
        self._setting = setting
        self._network = network
        self._batch = setting.batch()
        self._clock = _Clock(setting.device)
        self._optimizer = sgd(network)
        self._opt = SparseSAM(network, self._optimizer)
        self._weights = sum(p.numel() for p in network.parameters())
        self._measured: list[StepTimes] = []

    def measure(self) -> None:
        """Once more."""
        upstream: list[Tensor | None] = []
        both = self._pass(_BOTH, upstream)
        perturb = self._seconds(self._perturb)
        no_weights = self._pass(_NO_WEIGHTS, upstream)
        no_input = self._pass(_NO_INPUT, upstream)
        optimizer = self._seconds(self._step)
        stages = tuple(
            StageTimes(forward, backward, no_weights[i][1], no_input[i][1])
            for i, (forward, backward) in enumerate(both)
        )
        self._measured.append(StepTimes(stages, optimizer, perturb / self._weights))

    def medians(self) -> StepTimes:
        """Of all measurements but the first, which is a warm-up."""
        kept = self._measured[1:]

        def of(part: Callable[[StepTimes], float]) -> float:
            return statistics.median(part(times) for times in kept)

        stages = tuple(
            StageTimes(*(of(lambda t, i=i, k=k: dataclasses.astuple(t.stages[i])[k]) for k in range(4)))  # type: ignore[misc]
            for i in range(len(kept[0].stages))
        )
        return StepTimes(stages, of(lambda t: t.optimizer), of(lambda t: t.perturb))

    def _pass(self, computes: str, upstream: list[Tensor | None]) -> list[tuple[float, float]]:
        """Forward and backward of each stage by itself, on what the one before put out.

        Args:
            computes: which gradients.
            upstream: of each stage's output, its gradient; filled if both gradients are computed, else used, because
                without the gradients of inputs there is none.
        """
        clock, last = self._clock, len(self._network.stages) - 1
        for p in self._network.parameters():
            p.requires_grad_(computes != _NO_WEIGHTS)
        hidden, inputs, outputs, marks = self._batch[0], [], [], []
        for index in range(last + 1):
            x = hidden.detach().requires_grad_(computes != _NO_INPUT)

            def forward(x: Tensor, index: int = index) -> Tensor:
                hidden: Tensor = self._network(x, start=index, stop=index + 1)
                return hidden

            start = clock.now()
            if index < last:
                with self._setting.autocast():
                    hidden = forward(x)
            else:
                hidden = self._setting.loss_fn(forward, (x, self._batch[1]))
            marks.append([start, clock.now()])
            inputs.append(x)
            outputs.append(hidden)
        del hidden, x
        gradients: list[Tensor | None] = [None] * (last + 1) if computes == _BOTH else upstream
        for index in reversed(range(last + 1)):
            output, x, start = outputs.pop(), inputs.pop(), clock.now()
            output.backward(gradients[index])
            marks[index] += [start, clock.now()]
            if computes == _BOTH and index:
                gradients[index - 1] = x.grad
        if computes == _BOTH:
            upstream[:] = gradients
        for p in self._network.parameters():
            p.requires_grad_(True)
        clock.wait()
        return [(clock.seconds(a, b), clock.seconds(c, d)) for a, b, c, d in marks]

    def _seconds(self, work: Callable[[], None]) -> float:
        start = self._clock.now()
        work()
        end = self._clock.now()
        self._clock.wait()
        return self._clock.seconds(start, end)

    def _perturb(self) -> None:
        with self._opt.perturbed():
            pass

    def _step(self) -> None:
        self._optimizer.step()
        self._optimizer.zero_grad()


class _Steps:
    """Takes and times the steps of one way."""

    def __init__(self, way: Way, setting: Setting, network: StagedModel) -> None:
        self.way = way
        self._device = setting.device
        self.running = Running(way, setting, network)
        self.shapes: list[StepShape] = []
        self._seconds: list[float] = []

    def take(self, *, count: bool) -> None:
        """The steps of one round."""
        for _ in range(self.way.steps):
            shape = self.running.shape()
            self._synchronize()
            start = time.perf_counter()
            self.running.step()
            self._synchronize()
            if count:
                self._seconds.append(time.perf_counter() - start)
                self.shapes.append(shape)

    @property
    def seconds(self) -> float:
        """Of a step: the median over steps of one kind, and the mean of these as often as each kind came."""
        return typical([(s.cut, s.ascends) for s in self.shapes], self._seconds)

    @property
    def rounds(self) -> np.ndarray:
        """Mean seconds of a step in each round."""
        return np.array(self._seconds).reshape(-1, self.way.steps).mean(1)

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def typical(kinds: Sequence[Kind], seconds: Sequence[float]) -> float:
    """The median over what is of one kind, and the mean of these medians, each as often as its kind came."""
    by_kind: dict[Kind, list[float]] = {}
    for kind, value in zip(kinds, seconds, strict=True):
        by_kind.setdefault(kind, []).append(value)
    often = Counter(kinds)
    return sum(often[kind] * statistics.median(values) for kind, values in by_kind.items()) / len(kinds)


def spread(values: np.ndarray) -> float:
    """The interquartile range."""
    low, high = np.percentile(values, [25, 75])
    return float(high - low)


def bench_steps(setting: Setting, repeats: int, compared: Sequence[Way]) -> list[dict[str, Any]]:
    """Rows of the time of a step, one a plan.

    `seconds` of a step is the median over `repeats` rounds; where a plan's steps differ (an ascent or none, another
    cut) the median over steps of one kind, and the mean of these as often as each came. `time_over_base` is their ratio
    to the base optimizer's, `time_over_base_iqr` the interquartile range of the ratio over rounds, in each of which the
    two were taken shortly after each other. `density` and `suffix_share` (t: the perturbed suffix's share of a pass's
    measured time, forward and backward) are means over the steps, a step without an ascent counting 0.
    `predicted_over_base` comes from the measured parts alone (`predict`), which the row of the base optimizer lists;
    `target_over_base` is the most that we want.

    Args:
        setting: on what; one that `Setting.check` finds nothing wrong with.
        repeats: rounds, after one that warms up.
        compared: the plans, the base optimizer first.
    """
    if setting.device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    network = setting.network()
    parts = _Parts(setting, copy.deepcopy(network))
    each = [_Steps(way, setting, copy.deepcopy(network)) for way in compared]
    for done in range(repeats + 1):
        for steps in each:
            steps.take(count=done > 0)
        parts.measure()
    times, base = parts.medians(), each[0]
    common = environment(setting, repeats)
    rows = []
    for steps in each:
        way, shapes = steps.way, steps.shapes
        t = statistics.fmean(suffix_share(times, s.cut) if s.ascends else 0.0 for s in shapes)
        rows.append(
            {
                "model": setting.model,
                "plan": way.name,
                "density": statistics.fmean(s.perturbed for s in shapes) / steps.running.weights,
                "suffix_share": t,
                "fraction": way.fraction,
                "interval": way.interval,
                "steps": len(shapes),
                "seconds": steps.seconds,
                "seconds_iqr": spread(steps.rounds),
                "time_over_base": steps.seconds / base.seconds,
                "time_over_base_iqr": spread(steps.rounds / base.rounds),
                "predicted_over_base": predicted_over_base(times, shapes) if way.mask or steps is base else None,
                "target_over_base": way.target(t),
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

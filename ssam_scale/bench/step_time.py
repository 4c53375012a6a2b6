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
from torch import Tensor

from ssam_scale.clock import timed
from ssam_scale.costs.compute import StepShape, base_seconds, predicted_over_base, suffix_share
from ssam_scale.costs.profile import Parts
from ssam_scale.masks.subset import Subset
from ssam_scale.perturbation import StagedModel
from ssam_scale.perturbation.reference import first_samples
from ssam_scale.tracking.environment import hardware_tags, versions
from ssam_scale.tracking.timer import PhaseTimer

from .networks import Setting
from .scenarios import Running, Scenario, sgd

_VERSIONS = ("python", "ssam_scale", "torch", "timm")
# Memory is read and written by so many bytes at once: the lines of a processor's caches, the sectors of a GPU's.
_LINE = {"cpu": 64, "cuda": 32}
Kind = tuple[int, bool]  # of a step: its cut, and whether it has an ascent


class _Steps:
    """Takes and times the steps of one scenario.

    Args:
        scenario: whose.
        setting: on what.
        network: the setting's, and nobody else's.
        copies: memory for copies of the weights, by name, which scenarios share.

    Attributes:
        perturb: of each step that perturbs by one of our plans, the seconds of its phase "perturb", and of moving by
            copying what has to be moved for that.
    """

    def __init__(self, scenario: Scenario, setting: Setting, network: StagedModel, copies: dict[str, Tensor]) -> None:
        self.scenario = scenario
        self._device, self._compiled = setting.device, setting.compile
        self._timer = PhaseTimer(setting.device)
        self._copies = copies
        self.running = Running(scenario, setting, network, self._timer)
        self.shapes: list[StepShape] = []
        self.perturb: list[tuple[float, float]] = []
        self._seconds: list[float] = []

    def warm_up(self, rounds: int) -> None:
        """Compile, if anything is, what the steps of so many rounds run: a cut met first may need graphs of its own."""
        if not self._compiled or self.running.opt is None:
            return
        opt, met = self.running.opt, set()
        for step in range(rounds * self.scenario.steps):
            opt.steps = step
            shape = self.running.shape()
            if (kind := (shape.cut, shape.ascends)) not in met:
                met.add(kind)
                self.running.step()
                if opt.report is not None:
                    self._timer.step(opt.report.kind)
        opt.steps = 0
        self._timer.drain(wait=True)

    def take(self, *, count: bool) -> None:
        """The steps of one round."""
        for _ in range(self.scenario.steps):
            shape = self.running.shape()
            with timed(self._device) as step:
                self.running.step()
            perturb = self._perturb_seconds() if shape.perturbed else None
            if count:
                self._seconds.append(step.seconds)
                self.shapes.append(shape)
                self.perturb += [perturb] if perturb is not None else []

    def _perturb_seconds(self) -> tuple[float, float] | None:
        """Of the last step; see `perturb`."""
        opt = self.running.opt
        if opt is None or opt.report is None:
            return None
        self._timer.step(opt.report.kind)
        phases = self._timer.drain(wait=True).phases
        plan = opt.report.plan
        weights = {name: opt.parameters.by_name[name].detach() for name in plan.weights}
        for name, w in weights.items():
            if name not in self._copies:
                self._copies[name] = torch.empty_like(w)
        with timed(self._device) as copying:
            torch._foreach_copy_([self._copies[name] for name in weights], list(weights.values()))
        copied = 2 * sum(w.nbytes for w in weights.values())
        line = _LINE.get(self._device.type, 64)
        moved = sum(bytes_to_perturb(w, plan.weights[name], line) for name, w in weights.items())
        return phases["perturb"], copying.seconds * moved / copied

    @property
    def over_floor(self) -> dict[str, float | None]:
        """What a row says of `perturb`."""
        kinds = [(s.cut, True) for s in self.shapes if s.perturbed]
        if not self.perturb:
            return dict.fromkeys(("perturb_seconds", "perturb_floor_seconds", "perturb_over_floor"))
        seconds, floor = (typical(kinds, values) for values in zip(*self.perturb, strict=True))
        return {"perturb_seconds": seconds, "perturb_floor_seconds": floor, "perturb_over_floor": seconds / floor}

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


def bytes_to_perturb(weight: Tensor, subset: Subset | None, line: int) -> int:
    """The least that is read and written of memory to perturb a weight and to put it back: 28 bytes an fp32 element.

    The gradient is read for the norm; gradient and weight are read, the element as it was and the perturbed one
    written; the first is read and written back. Of gradient and weight whole lines move, also for an element in each;
    the elements as they were lie side by side.

    Args:
        weight: of which.
        subset: of it, that is perturbed; None: all.
        line: bytes that move at once.
    """
    size = weight.element_size()
    if subset is None:
        return 7 * weight.nbytes
    elements = line // size
    touched = torch.nn.functional.pad(subset.booleans(), (0, -subset.numel % elements)).view(-1, elements).any(1).sum()
    return 5 * line * int(touched) + 2 * size * subset.count


def bench_steps(setting: Setting, repeats: int, compared: Sequence[Scenario]) -> list[dict[str, Any]]:
    """Rows of the time of a step, one a plan.

    `seconds` of a step is the median over `repeats` rounds; where a plan's steps differ (an ascent or none, another
    cut) the median over steps of one kind, and the mean of these as often as each came. `time_over_base` is their ratio
    to the base optimizer's, `time_over_base_iqr` the interquartile range of the ratio over rounds, in each of which the
    two were taken shortly after each other. `density` and `suffix_share` (t: the perturbed suffix's share of a pass's
    measured time, forward and backward) are means over the steps, a step without an ascent counting 0.
    `predicted_over_base` comes from the measured parts alone (`costs.compute`), which the row of the base optimizer
    lists, those of an ascent on a part of the batch in passes of as many images; `target_over_base` is the most that we
    want.

    `perturb_seconds` is what perturbing and restoring take, the phase "perturb" of a step with an ascent, and
    `perturb_floor_seconds` what moving the bytes that this must move (`bytes_to_perturb`) takes by the speed at which
    the tensors that have perturbed weights are copied, right after the step; `perturb_over_floor` is their ratio. None
    for what is not ours.

    Args:
        setting: on what; one that `Setting.check` finds nothing wrong with.
        repeats: rounds, after one that warms up.
        compared: the plans, the base optimizer first.
    """
    network = setting.network()
    copied = copy.deepcopy(network)
    shares = {share for s in compared for share in (s.fraction, s.descent.fraction if s.descent else 1.0)}
    sizes = {first_samples(setting.batch_size, share) for share in shares if 0.0 < share < 1.0}
    parts = Parts(setting, copied, setting.batch(), sgd(copied), sizes)
    copies: dict[str, Tensor] = {}
    each = [_Steps(scenario, setting, copy.deepcopy(network), copies) for scenario in compared]
    for steps in each:
        steps.warm_up(repeats + 1)
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
                **steps.over_floor,
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
        "compile": setting.compile,
        "repeats": repeats,
        "device": torch.cuda.get_device_name(setting.device) if setting.device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "hardware": hardware_tags()["hardware"],
        "versions": {name: known[name] for name in _VERSIONS if name in known},
    }

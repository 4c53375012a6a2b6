"""The charts of a report."""

from __future__ import annotations

import math
import textwrap
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import fmean, stdev

from ssam_scale.tracking.compare.groups import Group
from ssam_scale.tracking.compare.rows import Comparison, Row
from ssam_scale.tracking.compare.runs import REQUESTS, Experiment
from ssam_scale.tracking.compare.statistics import frontier
from ssam_scale.tracking.drawing import clipped, dot, figure, in_style, legend, look, svg
from ssam_scale.tracking.layer_density import TABLE, LayerDensities, draw_densities
from ssam_scale.tracking.store import environment, text_artifact

# The timer's phases in the order of a step. Not asked of the timer, which would import torch to draw a few bars.
PHASE_COLOURS = {
    "data": "#bbbbbb",
    "reference": "#fdb863",
    "ascent forward": "#f4a582",
    "ascent backward": "#d6604d",
    "perturb": "#762a83",
    "descent forward": "#92c5de",
    "descent backward": "#4393c3",
    "optimizer": "#1b7837",
}


@dataclass(frozen=True)
class Picture:
    """A chart.

    Attributes:
        title: what it shows, in words.
        caption: how to read it.
        svg: the drawing.
        alternative: what it says, for those who do not see it.
    """

    title: str
    caption: str
    svg: str
    alternative: str


def pictures(comparison: Comparison) -> list[Picture]:
    """All charts of which the runs know something. Reads more of their histories, and their tables of layers."""
    made: list[Picture | None] = []
    with in_style():
        made += [_curves(comparison), _frontier(comparison), _phases(comparison)]
        made += [
            _layers(comparison.experiment, group, name)
            for group, name in zip(comparison.groups, names(comparison.rows), strict=True)
        ]
    return [picture for picture in made if picture is not None]


def names(rows: Sequence[Row]) -> list[str]:
    """A short name for each row, by which it is told from the others."""
    result = []
    for row in rows:
        same = [other for other in rows if other.method == row.method]
        telling = [
            value
            for key in ("model", "backend", "mask", "settings")
            if (value := getattr(row, key)) and len({getattr(other, key) for other in same}) > 1
        ]
        result.append(" ".join([row.method, *telling, *(["(running)"] if row.running else [])]))
    return result


def _curves(comparison: Comparison) -> Picture | None:
    """Accuracy against wall-clock, with a band of a standard deviation over seeds."""
    drawn = [(number, course) for number, group in enumerate(comparison.groups) if (course := _course(group))]
    if not drawn:
        return None
    chart, axes = figure()
    labels = names(comparison.rows)
    for number, course in drawn:
        seconds, top1, sd = zip(*course, strict=True)
        colour, line = look(number)
        axes.plot(
            seconds, top1, line, color=colour, label=clipped(labels[number]), marker="." if len(course) < 30 else ""
        )
        low, high = ([mean + sign * each for mean, each in zip(top1, sd, strict=True)] for sign in (-1, 1))
        axes.fill_between(seconds, low, high, color=colour, alpha=0.15, linewidth=0)
    if comparison.accuracy is not None:
        axes.axhline(comparison.accuracy, color="#888888", linewidth=0.8, linestyle=(0, (2, 2)))
    if comparison.wall_clock is not None:
        axes.axvline(comparison.wall_clock, color="#888888", linewidth=0.8, linestyle=(0, (2, 2)))
    axes.set_xlabel("seconds of training")
    axes.set_ylabel("top-1 %")
    axes.set_xlim(left=0.0)
    legend(chart, axes)
    last = "; ".join(f"{labels[number]} {course[-1][1]:.2f}% after {course[-1][0]:.0f} s" for number, course in drawn)
    return Picture(
        "Accuracy against wall-clock",
        "Mean over the seeds, each evaluation at its mean time; the band is ± a standard deviation over the seeds. "
        "Dashed lines: the accuracy and the time at which the table compares.",
        svg(chart),
        last,
    )


def _course(group: Group) -> list[tuple[float, float, float]]:
    """Seconds, mean top-1 and its deviation at each epoch that all seeds have evaluated."""
    curves = [run.curve for run in group.runs if run.curve]
    by_epoch: dict[float, list[tuple[float, float]]] = defaultdict(list)
    for curve in curves:
        for number, each in enumerate(curve):
            by_epoch[number if math.isnan(each.epoch) else each.epoch].append((each.seconds, each.top1))
    result = []
    for _, found in sorted(by_epoch.items()):
        if len(found) == len(curves):
            seconds, top1 = zip(*found, strict=True)
            result.append((fmean(seconds), fmean(top1), stdev(top1) if len(top1) > 1 else 0.0))
    return result


def _frontier(comparison: Comparison) -> Picture | None:
    """Accuracy against overhead, and which rows nothing beats in both."""
    labels = names(comparison.rows)
    points = [
        CostAndGain(number, labels[number], row.time_over_base, row.time_over_base_interval, row.top1, row.top1_sd)
        for number, row in enumerate(comparison.rows)
        if row.time_over_base is not None and row.top1 is not None
    ]
    return _frontier_of(points) if points else None


@dataclass(frozen=True)
class CostAndGain:
    """A point of the frontier.

    Attributes:
        number: by which it is coloured.
        label: a short name.
        over_base: the step's time over the base optimizer's.
        interval: of it, 95%; None where it is not known.
        top1: percent.
        sd: of it over the seeds; None of one.
    """

    number: int
    label: str
    over_base: float
    interval: tuple[float, float] | None
    top1: float
    sd: float | None


def frontier_picture(points: Sequence[CostAndGain]) -> Picture:
    """Accuracy against overhead, and which points nothing beats in both.

    Args:
        points: at least one.
    """
    with in_style():
        return _frontier_of(points)


def _frontier_of(points: Sequence[CostAndGain]) -> Picture:
    chart, axes = figure()

    def overhead(point: CostAndGain) -> float:
        return 100.0 * (point.over_base - 1.0)

    best = [points[index] for index in frontier([(overhead(point), point.top1) for point in points])]
    axes.plot([overhead(p) for p in best], [p.top1 for p in best], color="#888888", linewidth=1, zorder=1)
    for point in points:
        bounds, at, (colour, marker) = point.interval, overhead(point), dot(point.number)
        across = None
        if bounds is not None:
            across = [[max(0.0, at - 100 * (bounds[0] - 1))], [max(0.0, 100 * (bounds[1] - 1) - at)]]
        axes.errorbar(
            [at],
            [point.top1],
            xerr=across,
            yerr=None if point.sd is None else [point.sd],
            fmt=marker,
            color=colour,
            label=clipped(point.label),
            markersize=6,
            elinewidth=1,
            capsize=2,
        )
    axes.set_xlabel("overhead over the base optimizer, %")
    axes.set_ylabel("top-1 %")
    axes.margins(0.1)
    legend(chart, axes)
    return Picture(
        "Accuracy against overhead",
        "The line joins what no other row beats in both. Bars: a standard deviation over the seeds; of the overhead, "
        "the 95% interval of its probes.",
        svg(chart),
        "; ".join(f"{point.label} {point.top1:.2f}% at {overhead(point):+.0f}%" for point in points),
    )


def _phases(comparison: Comparison) -> Picture | None:
    """Where a step's time goes, stacked."""
    with ThreadPoolExecutor(REQUESTS) as threads:  # a server takes tens of milliseconds for each history
        phases = list(threads.map(lambda group: _mean_phases(comparison.experiment, group), comparison.groups))
    if not any(phases):
        return None
    labels = names(comparison.rows)
    drawn = [(labels[number], found) for number, found in enumerate(phases) if found]
    order = [phase for phase in PHASE_COLOURS if any(phase in found for _, found in drawn)]
    chart, axes = figure(0.7 + 0.34 * len(drawn))
    left = [0.0] * len(drawn)
    for phase in order:
        widths = [1000.0 * found.get(phase, 0.0) for _, found in drawn]
        if any(widths):
            axes.barh(range(len(drawn)), widths, left=left, color=PHASE_COLOURS[phase], label=phase, height=0.7)
            left = [start + width for start, width in zip(left, widths, strict=True)]
    labelled = ["\n".join(textwrap.wrap(label, 24, max_lines=2, placeholder=" …")) for label, _ in drawn]
    axes.set_yticks(range(len(drawn)), labelled, fontsize=9)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("ms in a step")
    legend(chart, axes)
    return Picture(
        "Where the time of a step goes",
        "Mean over all recorded steps and seeds, by the run's phase timers.",
        svg(chart),
        "; ".join(
            f"{label}: " + ", ".join(f"{phase} {1000 * found[phase]:.1f} ms" for phase in order if phase in found)
            for label, found in drawn
        ),
    )


def _mean_phases(experiment: Experiment, group: Group) -> dict[str, float]:
    """Seconds of a step in each phase, over windows and seeds."""
    found: dict[str, list[float]] = defaultdict(list)
    for run in group.runs:
        for phase in PHASE_COLOURS:
            key = f"time/{phase.replace(' ', '_')}"
            values = [p.value for p in experiment.history(run.id, key)] if key in run.metrics else []
            if values:
                found[phase].append(fmean(values))
    return {phase: sum(values) / len(group.runs) for phase, values in found.items()}


def _layers(experiment: Experiment, group: Group, name: str) -> Picture | None:
    """How much of each layer the latest run perturbed over time."""
    if group.method == "base" or not any(key.startswith("mask/") for key in group.runs[-1].metrics):
        return None  # no mask, no table: nothing is asked for
    with environment(MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR="false"):
        text = text_artifact(experiment.client, group.runs[-1].id, TABLE)
    try:
        densities = LayerDensities.from_table(text) if text is not None else None
    except ValueError:  # somebody else's
        return None
    if densities is None or not densities.steps or not densities.sizes:
        return None
    chart, axes = figure()
    rows = len(densities.sizes)
    image = draw_densities(axes, densities)
    axes.grid(visible=False)
    every = -(-len(densities.steps) // 5)
    axes.set_xticks(range(0, len(densities.steps), every), [f"{step:,}" for step in densities.steps[::every]])
    layers = list(densities.sizes)
    shown = sorted({round(i * (rows - 1) / max(min(rows, 6) - 1, 1)) for i in range(min(rows, 6))})
    axes.set_yticks(shown, [clipped(layers[row], 22) for row in shown], fontsize=8)
    axes.set_xlabel("step")
    bar = chart.colorbar(image, ax=axes, extend="min", pad=0.02)
    bar.set_ticks([1e-9, 0.5, 1.0], labels=["0", "½", "1"])
    total = sum(densities.sizes.values())
    means = [
        sum(size * density for size, density in zip(densities.sizes.values(), column, strict=True)) / max(total, 1)
        for column in densities.columns
    ]
    return Picture(
        f"Density of layers over time: {name}",
        f"The perturbed share of each of {rows} parameters of the latest seed, the first layers above; grey: none.",
        svg(chart),
        f"{name}: of all weights {100 * means[0]:.0f}% at first and {100 * means[-1]:.0f}% in the end",
    )

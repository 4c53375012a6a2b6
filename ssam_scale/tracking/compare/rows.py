"""What runs say about each other: a row for each group of runs that differ only in their seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import cast

from ssam_scale.tracking.compare import statistics
from ssam_scale.tracking.compare.alike import check_alike, differences, in_words
from ssam_scale.tracking.compare.groups import Group, grouped, judged_against, settings, timed_against
from ssam_scale.tracking.compare.runs import Experiment, find_experiment
from ssam_scale.tracking.compare.statistics import mean_sd

_NAMES = {"base": "the base optimizer alone", "sam": "dense SAM"}
_FEWEST = 2  # seeds on a side, below which a test of means has no variance to go by


@dataclass(frozen=True)
class Question:
    """What is asked of an experiment.

    Attributes:
        group: only runs whose tag `group` has this value.
        accuracy: top-1 in percent to which the time is asked; None: the best that every run reaches.
        wall_clock: seconds of training at which the accuracy is asked; None: those of the fastest method.
        price: of a GPU for an hour.
        allowed: in what runs may differ that are compared nevertheless (`alike.ASPECTS`).
        running: take runs that go on, too.
    """

    group: str | None = None
    accuracy: float | None = None
    wall_clock: float | None = None
    price: float | None = None
    allowed: frozenset[str] = frozenset()
    running: bool = False


@dataclass(frozen=True)
class Row:
    """Runs that differ only in their seed. Means are over them, `…_sd` sample standard deviations, None for one run.

    Attributes:
        method: `base`, `sam`, `ssam-<pattern>` or `ssam-dynamic`.
        model: timm's name.
        backend: how the weights were shared out.
        mask: which weights are perturbed, in words; empty for the base optimizer.
        settings: what tells this row from others of the same method, mask and model, but for the backend; empty if
            nothing else is needed.
        density: share of the weights that is perturbed, 0 to 1; None for the base optimizer or if it is not known.
        runs: how many, the latest of each seed.
        running: whether they go on, and all that follows is what they have so far.
        top1: accuracy after the last epoch, percent.
        top1_sd: see above.
        seconds: of training.
        seconds_sd: see above.
        images_per_second: of training.
        images_per_second_sd: see above.
        step_seconds: step time.
        time_over_base: step time divided by that of the base optimizer alone: 1 + overhead.
        time_over_base_interval: of it, the bounds of a 95% interval; None where it is not known.
        saving_over_sam: 1 − step time / that of dense SAM.
        saving_interval: of it, the same.
        by_probes: whether these two are measured inside of the runs (`tracking.saving`) rather than between them.
        gpu_hours: seconds of training times GPUs.
        gpu_hours_sd: see above.
        cost: these times the price.
        cost_sd: see above.
        seconds_to_accuracy: of training until the accuracy that was asked for.
        seconds_to_accuracy_sd: see above.
        top1_at_wall_clock: at the seconds of training that were asked for.
        top1_at_wall_clock_sd: see above.
        gain_over_base: in top-1, percentage points.
        p_over_base: of this gain, by Welch's t test and Holm's correction; `p_over_base_alone` is without correction.
        p_over_base_alone: see above.
        gain_over_sam: the same over dense SAM.
        p_over_sam: the same.
        p_over_sam_alone: the same.
        notes: by the name of an attribute, why it is missing or what to know about it.
        run_ids: MLflow's ids of the runs that count.
    """

    method: str
    model: str
    backend: str
    mask: str
    settings: str
    density: float | None
    runs: int
    running: bool
    top1: float | None = None
    top1_sd: float | None = None
    seconds: float | None = None
    seconds_sd: float | None = None
    images_per_second: float | None = None
    images_per_second_sd: float | None = None
    step_seconds: float | None = None
    time_over_base: float | None = None
    time_over_base_interval: tuple[float, float] | None = None
    saving_over_sam: float | None = None
    saving_interval: tuple[float, float] | None = None
    by_probes: bool = False
    gpu_hours: float | None = None
    gpu_hours_sd: float | None = None
    cost: float | None = None
    cost_sd: float | None = None
    seconds_to_accuracy: float | None = None
    seconds_to_accuracy_sd: float | None = None
    top1_at_wall_clock: float | None = None
    top1_at_wall_clock_sd: float | None = None
    gain_over_base: float | None = None
    p_over_base: float | None = None
    p_over_base_alone: float | None = None
    gain_over_sam: float | None = None
    p_over_sam: float | None = None
    p_over_sam_alone: float | None = None
    notes: Mapping[str, str] = field(default_factory=dict)
    run_ids: tuple[str, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """The answer.

    Attributes:
        experiment: of the runs.
        question: what was asked.
        rows: base first, then dense SAM, then the others, model by model.
        groups: the runs of each row.
        accuracy: top-1 in percent to which the time is given; None without an evaluation.
        wall_clock: seconds of training at which the accuracy is given; None without one.
        tests: how many tests of means the p values are corrected for.
        differences: in what the runs differ though they are compared, a line each.
    """

    experiment: Experiment
    question: Question
    rows: tuple[Row, ...]
    groups: tuple[Group, ...]
    accuracy: float | None
    wall_clock: float | None
    tests: int
    differences: tuple[str, ...]


def compare(uri: str, experiment: str, question: Question | None = None) -> Comparison:
    """Compare the finished runs of an experiment.

    Args:
        uri: MLflow tracking URI; nothing is created there.
        experiment: its name.
        question: what is asked.

    Raises:
        UserError: the store cannot be read, has no such experiment, the experiment has no such run, or the runs cannot
            be compared.
    """
    return compared(find_experiment(uri, experiment), question or Question())


def compared(experiment: Experiment, question: Question) -> Comparison:
    """The same of an experiment that was found.

    Raises:
        UserError: it has no such run, or the runs cannot be compared.
    """
    groups = grouped(experiment.runs(group=question.group, running=question.running))
    counting = [run for group in groups for run in group.runs]
    found = differences(counting)
    check_alike(found, counting, question.allowed, question.group)
    done = [[run.curve for run in group.runs] for group in groups if not group.running]
    accuracy, wall_clock = question.accuracy, question.wall_clock
    if accuracy is None:
        accuracy = statistics.reached_by_all(curve for curves in done for curve in curves)
    if wall_clock is None:
        wall_clock = statistics.fastest(done)
    rows = [_to_the_clock(_row(group, groups, question.price), group, accuracy, wall_clock) for group in groups]
    rows, tests = _tested(rows, groups)
    return Comparison(
        experiment, question, tuple(rows), tuple(groups), accuracy, wall_clock, tests, tuple(in_words(found))
    )


def _row(group: Group, groups: Sequence[Group], price: float | None) -> Row:
    notes: dict[str, str] = {}
    step = group.mean("summary/step_time")
    ratios = _ratios(group, groups, step, notes)
    seconds = [run.seconds for run in group.runs if run.seconds is not None]
    doubts = dict.fromkeys(run.seconds_by for run in group.runs if run.seconds_by)
    if doubts:
        notes["seconds"] = "; ".join(doubts)
    mixed = in_words(differences(group.runs))
    if mixed:
        notes["runs"] = f"of {'; '.join(mixed)}"
    hours = [each * group.gpus / 3600.0 for each in seconds] if group.gpus else []
    if not group.gpus:
        notes["gpu_hours"] = "no GPU"
    if price is not None and not group.gpus:
        notes["cost"] = "no GPU, and the price is of one"
    top1, top1_sd = mean_sd(group.values("summary/top1"))
    seconds_mean, seconds_sd = mean_sd(seconds)
    rates, rates_sd = mean_sd([run.images_per_second for run in group.runs if run.images_per_second is not None])
    hours_mean, hours_sd = mean_sd(hours)
    cost, cost_sd = mean_sd([each * price for each in hours] if price is not None else [])
    return Row(
        method=group.method,
        model=group.model,
        backend=group.backend,
        mask=group.mask,
        settings=settings(group, groups),
        density=_density(group),
        runs=len(group.runs),
        running=group.running,
        top1=top1,
        top1_sd=top1_sd,
        seconds=seconds_mean,
        seconds_sd=seconds_sd,
        images_per_second=rates,
        images_per_second_sd=rates_sd,
        step_seconds=step,
        time_over_base=ratios.time_over_base,
        time_over_base_interval=ratios.time_over_base_interval,
        saving_over_sam=ratios.saving,
        saving_interval=ratios.saving_interval,
        by_probes=ratios.by_probes,
        gpu_hours=hours_mean,
        gpu_hours_sd=hours_sd,
        cost=cost,
        cost_sd=cost_sd,
        notes=notes,
        run_ids=tuple(run.id for run in group.runs),
    )


@dataclass(frozen=True)
class _Ratios:
    """What a row costs and saves."""

    time_over_base: float | None
    saving: float | None
    time_over_base_interval: tuple[float, float] | None = None
    saving_interval: tuple[float, float] | None = None
    by_probes: bool = False


def _ratios(group: Group, groups: Sequence[Group], step: float | None, notes: dict[str, str]) -> _Ratios:
    probed = _probed(group, groups)
    if probed is not None:
        return probed
    ratios: dict[str, float | None] = {}
    for method, key in (("base", "time_over_base"), ("sam", "saving_over_sam")):
        reference = timed_against(group, groups, method)
        seconds = None if reference is None else reference.mean("summary/step_time")
        ratios[method] = step / seconds if step is not None and seconds else None
        if step is None:
            notes[key] = f"{group.method}: no step time was recorded"
        elif ratios[method] is None:
            notes[key] = f"no finished run of {_NAMES[method]} with {group.timing_words()}"
    over_sam = ratios["sam"]
    if over_sam is not None and not group.is_reference("sam"):
        why = dict.fromkeys(run.tags["saving"].removeprefix("unknown: ") for run in group.runs if "saving" in run.tags)
        notes["saving_over_sam"] = "; ".join(
            ["between runs, whose times other work on the machine shifts: not all have probes", *why]
        )
    return _Ratios(ratios["base"], None if over_sam is None else 1.0 - over_sam)


def _probed(group: Group, groups: Sequence[Group]) -> _Ratios | None:
    """By the probes of the group's own runs, if all have some; the base optimizer's saving by those of dense SAM."""
    overhead, saving = (group.mean_of_all(f"summary/{name}_percent") for name in _PROBED)
    if group.method == "base":
        sam = timed_against(group, groups, "sam")
        dense = None if sam is None else sam.mean_of_all(f"summary/{_PROBED[0]}_percent")
        if sam is None or dense is None:
            return None
        bounds = _interval(sam, _PROBED[0])
        saved = None if bounds is None else (_saved_by_base(bounds[0]), _saved_by_base(bounds[1]))
        return _Ratios(1.0, _saved_by_base(dense / 100.0), saving_interval=saved, by_probes=True)
    if overhead is None or saving is None:
        return None
    over = _interval(group, _PROBED[0])
    return _Ratios(
        1.0 + overhead / 100.0,
        saving / 100.0,
        None if over is None else (1.0 + over[0], 1.0 + over[1]),
        _interval(group, _PROBED[1]),
        by_probes=True,
    )


def _saved_by_base(overhead: float) -> float:
    """The share of dense SAM's time that the base optimizer does not take, by dense SAM's overhead over it."""
    return 1.0 - 1.0 / (1.0 + overhead)


_PROBED = "overhead_vs_base", "saving_vs_dense"


def _interval(group: Group, figure: str) -> tuple[float, float] | None:
    """The means over the runs of the bounds of a figure's intervals, as shares."""
    low, high = (group.mean_of_all(f"summary/{figure}_percent_{bound}") for bound in ("low", "high"))
    unknown = low is None or high is None or low == high  # of dense SAM itself, which saves nothing for certain
    return None if unknown else (cast(float, low) / 100.0, cast(float, high) / 100.0)


def _density(group: Group) -> float | None:
    if group.method == "base":
        return None
    measured = group.mean("summary/density")
    if measured is not None:
        return measured
    if group.method == "sam":
        return 1.0
    sparsity = group.params.get("perturbation.mask.sparsity")
    final = group.params.get("perturbation.mask.sparsity_final", "null")
    return 1.0 - float(sparsity) if sparsity is not None and final == "null" else None


def _to_the_clock(row: Row, group: Group, accuracy: float | None, wall_clock: float | None) -> Row:
    """The row with what its evaluations say.

    Args:
        row: without it.
        group: the row's.
        accuracy: top-1 in percent to which the time is asked.
        wall_clock: seconds at which the accuracy is asked.
    """
    notes = dict(row.notes)
    curves = [run.curve for run in group.runs]
    if not any(curves):
        missing = "no evaluation was recorded"
        return replace(row, notes=notes | {"seconds_to_accuracy": missing, "top1_at_wall_clock": missing})
    times = [None if accuracy is None else statistics.seconds_to(curve, accuracy) for curve in curves]
    tops = [None if wall_clock is None else statistics.top1_at(curve, wall_clock) for curve in curves]
    for key, found, what in (
        ("seconds_to_accuracy", times, "reached this top-1"),
        ("top1_at_wall_clock", tops, "had an evaluation by then"),
    ):
        if None in found:
            notes[key] = f"{len(found) - found.count(None)} of {len(found)} runs {what}"
    (to, to_sd), (at, at_sd) = _mean_sd_of_all(times), _mean_sd_of_all(tops)
    return replace(
        row,
        seconds_to_accuracy=to,
        seconds_to_accuracy_sd=to_sd,
        top1_at_wall_clock=at,
        top1_at_wall_clock_sd=at_sd,
        notes=notes,
    )


def _mean_sd_of_all(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Of nothing where one is missing: the mean of those that reach an accuracy would be that of the lucky ones."""
    known = [value for value in values if value is not None]
    return mean_sd(known if len(known) == len(values) else [])


def _tested(rows: Sequence[Row], groups: Sequence[Group]) -> tuple[list[Row], int]:
    """The rows with their gains over base and dense SAM, and how many tests there were: one for each pair of groups."""
    p_values: dict[frozenset[int], float] = {}
    asked: list[tuple[int, str, Group]] = []
    result = list(rows)
    for index, group in enumerate(groups):
        for method in ("base", "sam"):
            if group.is_reference(method):
                continue
            reference = None if group.running else judged_against(group, groups, method)
            if reference is None:
                why = "the runs go on" if group.running else f"no finished run of {_NAMES[method]}, same model and data"
                result[index] = _noted(result[index], f"gain_over_{method}", why)
                continue
            asked.append((index, method, reference))
            pair = frozenset((index, groups.index(reference)))
            mine, theirs = group.values("summary/top1"), reference.values("summary/top1")
            if pair not in p_values and min(len(mine), len(theirs)) >= _FEWEST:
                p = statistics.welch(mine, theirs)
                if p is not None:
                    p_values[pair] = p
    corrected = dict(zip(p_values, statistics.holm(list(p_values.values())), strict=True))
    for index, method, reference in asked:
        pair = frozenset((index, groups.index(reference)))
        result[index] = _with_gain(
            result[index], groups[index], method, reference, corrected.get(pair), p_values.get(pair)
        )
    return result, len(corrected)


def _with_gain(row: Row, group: Group, method: str, reference: Group, p: float | None, alone: float | None) -> Row:
    mine, theirs = group.values("summary/top1"), reference.values("summary/top1")
    gain = fmean(mine) - fmean(theirs) if mine and theirs else None
    differing = group.differing_from(reference)
    if gain is None:
        row = _noted(row, f"gain_over_{method}", "no accuracy was recorded")
    elif differing:
        row = _noted(row, f"gain_over_{method}", f"{_NAMES[method]} differs in {', '.join(differing)}, too")
    if p is None and gain is not None:
        few = min(len(mine), len(theirs)) < _FEWEST
        why = (
            f"a test needs {_FEWEST} seeds on each side, and there are {len(mine)} and {len(theirs)}"
            if few
            else "neither side varies"
        )
        row = _noted(row, f"p_over_{method}", why)
    values = {f"gain_over_{method}": gain, f"p_over_{method}": p, f"p_over_{method}_alone": alone}
    return replace(row, **values)  # type: ignore[arg-type]


def _noted(row: Row, key: str, text: str) -> Row:
    return replace(row, notes={**row.notes, key: text})

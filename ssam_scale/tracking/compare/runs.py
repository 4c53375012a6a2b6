"""Training runs as MLflow has them: parameters, tags, latest metrics, data, and their course over training seconds."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, NamedTuple

from ssam_scale.errors import UserError
from ssam_scale.tracking.compare.statistics import Evaluation
from ssam_scale.tracking.identity import KIND
from ssam_scale.tracking.moved import follow_moved
from ssam_scale.tracking.redaction import without_secrets
from ssam_scale.tracking.store import one_line, open_store, sqlite_path

_log = logging.getLogger(__name__)

_PAGE = 500
_SHOWN_GROUPS = 8
REQUESTS = 4
"""For histories at the same time, each of which a server takes tens of milliseconds for."""


# What a run that goes on has by now of what stands for it in the end.
_SO_FAR = {
    "summary/top1": "val/top1",
    "summary/step_time": "time/step",
    "summary/density": "mask/density",
    **{
        f"summary/{name.replace('/', '_')}{bound}": f"{name}{bound}"
        for name in ("saving/vs_dense_percent", "overhead/vs_base_percent")
        for bound in ("", "_low", "_high")
    },
}


@dataclass(frozen=True)
class TrainedRun:
    """One training.

    Attributes:
        id: MLflow's.
        name: MLflow's.
        status: `FINISHED`, or `RUNNING`.
        started: milliseconds since 1970.
        params: its parameters.
        tags: its tags.
        metrics: the latest value of each.
        datasets: digest of each data set that was logged as an input, by what it was for.
        curve: its evaluations, in order.
        seconds: of training, without evaluations, probes and checkpoints; None if it is not known.
        seconds_by: why these are not sums of all epochs' times; empty if they are.
        images_per_second: all images over the seconds of all steps.
    """

    id: str
    name: str
    status: str
    started: int
    params: Mapping[str, str]
    tags: Mapping[str, str]
    metrics: Mapping[str, float]
    datasets: Mapping[str, str] = field(default_factory=dict)
    curve: tuple[Evaluation, ...] = ()
    seconds: float | None = None
    seconds_by: str = ""
    images_per_second: float | None = None

    @property
    def running(self) -> bool:
        """Whether it goes on."""
        return self.status == "RUNNING"

    @property
    def seed(self) -> str:
        """Of its random numbers; empty if it is not known."""
        return self.params.get("train.seed", "")

    def metric(self, name: str) -> float | None:
        """The latest value, of a run that goes on that of what it will be summed up from; None without a number."""
        found = self.metrics.get(name)
        if found is None and self.running:
            found = self.metrics.get(_SO_FAR.get(name, ""))
        return found if found is not None and math.isfinite(found) else None


class Point(NamedTuple):
    """A value of a metric's history."""

    step: int
    value: float
    timestamp: int


class Experiment:
    """An experiment of a store that has answered. Finished runs are read once.

    Attributes:
        client: MLflow's.
        uri: of the store.
        id: MLflow's.
        name: of the experiment.
    """

    def __init__(self, client: Any, uri: str, id: str, name: str) -> None:
        self.client, self.uri, self.id, self.name = client, uri, id, name
        self._read: dict[str, TrainedRun] = {}

    def runs(self, *, group: str | None = None, running: bool = False) -> list[TrainedRun]:
        """Finished trainings, the oldest first.

        Args:
            group: only those whose tag `group` has this value.
            running: those that go on, too.

        Raises:
            UserError: there is none; says what there is.
        """
        try:
            # MLflow knows no "or".
            found = self._trainings("" if running else "attributes.status = 'FINISHED'")
            chosen = [
                run
                for run in found
                if run.info.status in ("FINISHED", "RUNNING") and (group is None or run.data.tags.get("group") == group)
            ]
            if not chosen:
                raise UserError(self._none(self._trainings(), group, running))
            with ThreadPoolExecutor(REQUESTS) as threads:
                read = list(threads.map(self._with_course, chosen))
        except UserError:
            raise
        except Exception as error:  # MLflow lets its stores' errors through, of every kind
            raise UserError(f"tracking.uri {without_secrets(self.uri)}: {one_line(error)}") from error
        return sorted(read, key=lambda run: run.started)

    def history(self, run_id: str, metric: str) -> list[Point]:
        """The numbers of a metric by step, rising; of several of a step (a run that was resumed) the latest."""
        by_step: dict[int, Point] = {}
        for each in sorted(self.client.get_metric_history(run_id, metric), key=lambda each: each.timestamp):
            if math.isfinite(each.value):
                by_step[each.step] = Point(each.step, each.value, each.timestamp)
        return [by_step[step] for step in sorted(by_step)]

    def _trainings(self, query: str = "") -> list[Any]:
        runs: list[Any] = []
        token = None
        while True:
            page = self.client.search_runs([self.id], query, max_results=_PAGE, page_token=token)
            runs.extend(run for run in page if "method" in run.data.tags and KIND not in run.data.tags)
            token = page.token
            if not token:
                break
        parents = {run.data.tags.get("mlflow.parentRunId") for run in runs}
        # One that only holds others together was never trained.
        return [run for run in runs if run.info.run_id not in parents or "summary/top1" in run.data.metrics]

    def _none(self, found: list[Any], group: str | None, running: bool) -> str:
        counts: dict[str, int] = defaultdict(int)
        for run in found:
            counts[run.info.status] += 1
        others = ", ".join(f"{number} {status}" for status, number in sorted(counts.items()))
        what = "finished or running" if running else "finished"
        where = f"experiment {self.name!r}" + (f", group {group!r}" if group is not None else "")
        groups = sorted({run.data.tags["group"] for run in found if "group" in run.data.tags})
        there = ""
        if group is not None and group not in groups:
            near = get_close_matches(group, groups, n=_SHOWN_GROUPS, cutoff=0.0)
            more = len(groups) - len(near)
            there = f"; its groups: {', '.join(map(repr, near))}" if groups else "; none of them has a group"
            there += f" and {more} more" if more else ""
        return f"no {what} run in {where}" + (f"; the experiment has {others}{there}" if others else "; it is empty")

    def _with_course(self, run: Any) -> TrainedRun:
        known = self._read.get(run.info.run_id)
        if known is None:
            known = self._trained(run)
            if not known.running:
                self._read[known.id] = known
        return known

    def _trained(self, run: Any) -> TrainedRun:
        info, metrics = run.info, run.data.metrics
        histories = {
            key: self.history(info.run_id, key)
            for key in ("val/top1", "epoch", "time/epoch", "time/probe", "train/images_per_second")
            if key in metrics
        }
        clock = _TrainingClock(histories, info.start_time)
        points = histories.get("val/top1", [])
        epochs = {point.step: point.value for point in histories.get("epoch", [])}
        curve = [
            Evaluation(seconds, epochs.get(point.step, math.nan), point.value)
            for point in points
            if (seconds := clock.at(point)) is not None
        ]
        last = histories.get("time/epoch") or points
        return TrainedRun(
            id=info.run_id,
            name=info.run_name or "",
            status=info.status,
            started=info.start_time,
            params=run.data.params,
            tags=run.data.tags,
            metrics=metrics,
            datasets=_digests(run),
            curve=tuple(curve),
            seconds=clock.at(last[-1]) if last else None,
            seconds_by=clock.doubt,
            images_per_second=_images_per_second(histories.get("train/images_per_second", [])),
        )


def find_experiment(uri: str, name: str) -> Experiment:
    """An experiment of a store; nothing is created there.

    Raises:
        UserError: the store cannot be read or has no such experiment; names the nearest one.
    """
    client = open_store(uri, create=False)
    try:
        found = client.get_experiment_by_name(name)
        names = [each.name for each in client.search_experiments()]
    except Exception as error:
        raise UserError(f"tracking.uri {without_secrets(uri)}: {one_line(error)}") from error
    if found is None or found.lifecycle_stage == "deleted":
        near = get_close_matches(name, names, n=1, cutoff=0.0)
        hint = f"; did you mean {near[0]!r}?" if near else "; it has none"
        raise UserError(f"no experiment {name!r} in {without_secrets(uri)}{hint}")
    try:
        follow_moved(found, uri, sqlite_path(uri))
    except UserError as error:
        _log.warning("%s", error)  # what is compared is in the store itself
    return Experiment(client, uri, str(found.experiment_id), name)


class _TrainingClock:
    """Seconds of training at any step of a run.

    They are the sum of the epochs' times (`time/epoch`), which begin with an epoch's first step and end with its last,
    without probes, evaluations and checkpoints. Where a run lacks some (it was resumed in another run, or the store was
    away), the missing ones count as the mean of the others. Where it has none, MLflow's timestamps tell the seconds
    since the run began, and what probes took is subtracted; evaluations, which nothing times, are then included.

    Args:
        histories: of `time/epoch`, `epoch` and `time/probe`.
        started: when the run began, milliseconds.
    """

    def __init__(self, histories: Mapping[str, list[Point]], started: int) -> None:
        self._times = histories.get("time/epoch", [])
        self._epochs = {point.step: point.value for point in histories.get("epoch", [])}
        self._probes, self._started = histories.get("time/probe", []), started
        self.doubt = ""
        """Why they are not the sum of all epochs' times."""

    def at(self, point: Point) -> float | None:
        """At the step of a point; None if it is not known."""
        if not self._times:
            self.doubt = "by timestamps, with evaluations: no epoch's time was recorded"
            seconds = (point.timestamp - self._started) / 1000.0
            return max(0.0, seconds - sum(probe.value for probe in self._probes if probe.step <= point.step))
        known = [each.value for each in self._times if each.step <= point.step]
        done = self._epochs.get(point.step, len(known))
        if not known:
            return None
        if done > len(known):
            self.doubt = "some epochs' times were not recorded; each counts as the mean of the others"
            return sum(known) * done / len(known)
        return sum(known)


def _images_per_second(windows: list[Point]) -> float | None:
    """Of all windows of steps together: each has as many images as steps, times a constant that drops out."""
    steps = [point.step - before for point, before in zip(windows, [0, *(w.step for w in windows)], strict=False)]
    if len(steps) > 1:  # a run that goes on for another one does not begin at 0
        steps[0] = min(steps[0], max(steps[1:]))
    rated = [(count, w.value) for count, w in zip(steps, windows, strict=True) if count > 0 and w.value > 0]
    return sum(count for count, _ in rated) / sum(count / rate for count, rate in rated) if rated else None


def _digests(run: Any) -> dict[str, str]:
    inputs = getattr(run, "inputs", None)
    found = {}
    for each in inputs.dataset_inputs if inputs is not None else ():
        context = next((tag.value for tag in each.tags if tag.key == "mlflow.data.context"), each.dataset.name)
        found[context] = each.dataset.digest
    return found

"""One training run as its trackers see it: what it was, what it measured, how it ended."""

from __future__ import annotations

import logging
import math
import tempfile
from array import array
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from ssam_scale.config.schema import Config
from ssam_scale.data.images import Images
from ssam_scale.tracking.commands import interface_lines
from ssam_scale.tracking.dense import ascends_densely
from ssam_scale.tracking.describe import mask_words, plan_words, story
from ssam_scale.tracking.environment import environment_tags, world_size
from ssam_scale.tracking.identity import CONFIGURATION, fingerprint
from ssam_scale.tracking.layer_density import LayerRecorder
from ssam_scale.tracking.redaction import all_without_secrets, without_secrets
from ssam_scale.tracking.saving import Probe, Saving
from ssam_scale.tracking.shutdown import Unwinding, leave_note, outcome, read_note
from ssam_scale.tracking.store import flatten, one_line, open_store, shortened
from ssam_scale.tracking.timer import PhaseSummary
from ssam_scale.tracking.tracker import DESCRIPTION, TRACKERS, Start, Tracker

if TYPE_CHECKING:
    from torch import nn

_log = logging.getLogger(__name__)

# Compilation, allocator growth and cold caches: these steps say nothing about the ones that follow.
WARMUP_STEPS = 10

# The limit of MLflow's stores.
_TAG_CHARACTERS = 8000

# How long the last table and picture may take, for which no store is asked. Launchers kill for good 30 s after they ask
# politely.
_FINISH_S = {"FINISHED": 60.0, "FAILED": 6.0, "KILLED": 3.0}


def open_run(
    config: Config,
    *,
    enabled: bool,
    resume_run_id: str | None = None,
    step: int = 0,
    extra_tags: Mapping[str, str] | None = None,
    extra_params: Mapping[str, str] | None = None,
    gpus: int = 0,
) -> Run:
    """The run that `config` describes, to be entered with `with`.

    On entering, SIGTERM and SIGHUP become the exception `Terminated` (exit code 143 for SIGTERM) until the `with` ends.
    On leaving, the run is FINISHED, FAILED (with the error's line as tag `failure`) or KILLED (a signal, Ctrl-C).

    Args:
        config: the resolved configuration; its `tracking.trackers` record it, and the rest.
        enabled: true on the one process that tracks. On others every method does nothing, but signals unwind them too,
            and a failure there is what the run is marked by.
        resume_run_id: continue this run of MLflow's; a new one, tagged `resumed_from`, is made if the store does not
            know it, or if `extra_tags` say that an epoch has other steps than its.
        step: optimizer steps done; more than 0: the run goes on.
        extra_tags: further tags, which win over the ones found out here (e.g. `backend` once it is resolved).
        extra_params: further parameters, which win over the configuration's (what it leaves to the machine).
        gpus: that it computes on, all processes together.

    Raises:
        UserError: on entering, when a tracker cannot be used.
    """
    return Run(config, enabled, resume_run_id, step, dict(extra_tags or {}), dict(extra_params or {}), gpus)


def run_lines(config: Config, run_id: str | None) -> list[str]:
    """What to type and where to look to see a run that has ended; nothing if no store knows it now."""
    uri = config.tracking.store
    if uri is None or run_id is None:
        return []
    try:
        experiment = open_store(uri, create=False).get_run(run_id).info.experiment_id
    except Exception:  # MLflow lets its stores' errors through, of every kind; here nothing depends on them
        return []
    return interface_lines(uri, experiment, run_id)


def _typical(times: Sequence[float]) -> float:
    """The mean of step times without the first WARMUP_STEPS (if there are more), the lowest and the highest tenth."""
    times = times[WARMUP_STEPS:] or times
    tenth = len(times) // 10
    kept = sorted(times)[tenth : len(times) - tenth]
    return sum(kept) / len(kept)


def _slow_steps(times: Sequence[float]) -> dict[str, float]:
    """The time that 95% of the steps take at the most, and the longest."""
    return {"p95": float(np.percentile(times, 95)), "max": max(times)}


def _rounded(density: float | None) -> str | None:
    """For a tag that runs are filtered by."""
    return None if density is None else f"{density:.2f}"


def _phase_times(prefix: str, summary: PhaseSummary) -> dict[str, float]:
    return {f"{prefix}/{name.replace(' ', '_')}": seconds for name, seconds in summary.phases.items()}


class Run:
    """See `open_run`. What is recorded and when; where to is decided by its trackers, of which there may be none.

    `signals` are those that ask this process to end.
    """

    def __init__(
        self,
        config: Config,
        enabled: bool,
        resume_run_id: str | None,
        step: int,
        extra_tags: dict[str, str],
        extra_params: dict[str, str],
        gpus: int,
    ) -> None:
        self._config, self._enabled, self._step = config, enabled, step
        self._resume_run_id, self._extra_tags, self._extra_params = resume_run_id, extra_tags, extra_params
        self._trackers: list[Tracker] = []
        self._layers: LayerRecorder | None = None
        self.signals = Unwinding(self._mark_stuck if enabled else None)
        self._step_times = array("d")
        self._times_by_kind: dict[str, array[float]] = {}
        self._refresh_seconds = 0.0
        self._saving = Saving(config.method, dense=ascends_densely(flatten(config)), gpus=gpus)
        self._densities = array("d")
        self._params: dict[str, str] = {}
        self._tags: dict[str, str] = {}
        self._top1: float | None = None
        self._best_top1: float | None = None

    @property
    def id(self) -> str | None:
        """MLflow's id of the run; None where it does not record it, and on processes that do not track."""
        return next((tracker.run_id for tracker in self._trackers if tracker.run_id is not None), None)

    def __enter__(self) -> Run:
        self.signals.__enter__()
        try:
            if self._enabled:
                self._open()
        except BaseException as error:
            self._close(error)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._close(error)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record metrics at an optimizer step. Returns at once; the values are written in the background, in order."""
        for tracker in self._trackers:
            tracker.log(metrics, step)

    def log_window(
        self,
        summary: PhaseSummary,
        *,
        loss: float,
        lr: float,
        images_per_step: int,
        step: int,
        densities: Sequence[float] = (),
    ) -> None:
        """Record the steps since the last call: times of all of them as `time/…`, and of each kind as `time/<kind>/…`.

        Args:
            summary: their times, from `PhaseTimer.drain`.
            loss: training loss, mean over the steps.
            lr: learning rate of the last of them.
            images_per_step: images in one optimizer step over all processes.
            step: number of the last of them, counted from 1.
            densities: share of the weights that each of them perturbed, if known.
        """
        self._step_times.extend(summary.step_times)
        self._densities.extend(densities)
        self._saving.count(summary)
        metrics = {"train/loss": loss, "train/lr": lr} | self._saving.metrics(intervals=False)
        if summary.steps:
            metrics["time/step"] = summary.step
            metrics |= {f"time/step_{name}": value for name, value in _slow_steps(summary.step_times).items()}
            metrics["train/images_per_second"] = images_per_step * summary.steps / summary.seconds
            metrics |= _phase_times("time", summary)
            for kind, of_kind in summary.by_kind.items():
                self._times_by_kind.setdefault(kind, array("d")).extend(of_kind.step_times)
                metrics[f"time/{kind}/step"] = of_kind.step
                metrics |= _phase_times(f"time/{kind}", of_kind)
        if densities:
            metrics["mask/density"] = sum(densities) / len(densities)
        self.log(metrics, step)

    def log_probe(self, probe: Probe, *, seconds: float, step: int) -> None:
        """Record a probe, which took so many seconds before the step after `step`, and what is known of the saving."""
        self._saving.add(probe)
        times = {"time/probe": seconds, "probe/base": probe.base, "probe/dense": probe.dense, "probe/own": probe.own}
        if probe.reference:
            times["probe/reference"] = probe.reference
        self.log(times | self._saving.metrics(intervals=self._saving.interval_is_due), step)

    def no_saving(self, reason: str) -> None:
        """Say why nothing will be known of the saving: the tag `saving`."""
        self._tag("saving", f"unknown: {reason}")

    def log_refresh(
        self,
        *,
        seconds: float,
        step: int,
        refreshes: int = 1,
        density: float | None = None,
        turnover: float = math.nan,
        samples: int | None = None,
    ) -> None:
        """Record that the mask was chosen anew before the step after `step`, which is part of what the method costs.

        Args:
            seconds: how long it took.
            step: steps done.
            refreshes: how many there were since the one that was recorded before, each of which takes as long.
            density: share of all weights that the mask perturbs.
            turnover: share of them that the mask before did not perturb; not a number for the first.
            samples: images that were scored, if the scores are of samples.
        """
        self._refresh_seconds += seconds * refreshes
        self._saving.refreshes = self._refresh_seconds
        metrics = {"time/refresh": seconds, "mask/density": density, "mask/turnover": turnover, "mask/samples": samples}
        known = {key: value for key, value in metrics.items() if value is not None and not math.isnan(value)}
        self.log(known, step)

    def log_layers(self, counts: Mapping[str, float], sizes: Mapping[str, int], *, step: int, steps: str) -> None:
        """Record how much of each layer is perturbed: a column of `mask/density.csv` and of the heat map beside it.

        Returns at once. The files are written in the background, at the latest when the run ends.

        Args:
            counts: perturbed weights of each parameter that has any, over all processes; or their mean over steps.
            sizes: all weights of each parameter, in the network's order.
            step: steps done.
            steps: what `step` is, in the words of the heat map.
        """
        if self._layers is not None:
            self._layers.add(counts, sizes, step, steps)

    def log_evaluation(
        self,
        *,
        top1: float,
        top5: float | None,
        loss: float,
        epoch: float,
        step: int,
        raw: Mapping[str, float | None] | None = None,
    ) -> None:
        """Record an evaluation, of the averaged weights where there are any.

        Args:
            top1: accuracy, percent.
            top5: accuracy by the five best, percent; None where it means nothing.
            loss: mean.
            epoch: epochs done.
            step: steps done.
            raw: the same three of the weights that are trained, if `top1` and the others are of averaged ones.
        """
        self._top1 = top1
        self._best_top1 = top1 if self._best_top1 is None else max(top1, self._best_top1)
        metrics = {"val/top1": top1, "val/top5": top5, "val/loss": loss, "epoch": epoch}
        metrics |= {f"val/raw_{name}": value for name, value in (raw or {}).items()}
        self.log({key: value for key, value in metrics.items() if value is not None}, step)

    def log_epoch(self, *, epoch: float, seconds: float, step: int) -> None:
        """Record that `epoch` epochs are done and how long the last one took."""
        self.log({"epoch": epoch, "time/epoch": seconds}, step)

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Store a copy of a file with the run, in `folder` of its artifacts; what fails is a warning, not an error.

        Returns when it is copied; it is sent in the background. What a tracker keeps of files is its own affair.
        """
        for tracker in self._trackers:
            tracker.artifact(path, folder)

    def log_text(self, text: str, name: str) -> None:
        """Store a text as the artifact `name`, a path; what fails is a warning, a full temporary folder too."""

        def store() -> None:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / Path(name).name
                path.write_text(text, encoding="utf-8")
                self.log_artifact(path, str(Path(name).parent))

        if self._trackers:
            try:
                store()
            except OSError as error:
                _log.warning("artifact %s of run %s could not be stored: %s", name, self.id, one_line(error))

    def log_data(self, images: Images, *, context: str, side: int) -> None:
        """Record which images the run reads, as a data set of MLflow: see `data.dataset_input`."""
        for tracker in self._trackers:
            tracker.data(images, context, side)

    def log_network(self, network: Callable[[], nn.Module], *, side: int, classes: int, step: int) -> None:
        """Store what was trained as a model of MLflow: see `network.log_network`. Takes some seconds.

        Args:
            network: makes it, on the CPU.
            side: of the square images, pixels.
            classes: that it tells apart.
            step: steps done.
        """
        for tracker in self._trackers:
            tracker.network(network, side=side, classes=classes, step=step)

    def watch_machine(self, node: str | None = None) -> AbstractContextManager[object]:
        """Within the `with`, what this machine does is recorded as `system/…`.

        Args:
            node: its name, where there are others; None: there are not.
        """
        watching = ExitStack()
        for tracker in self._trackers:
            watching.enter_context(tracker.watching_machine(node))
        return watching

    def finish_summary(self, straggler: str | None = None) -> dict[str, float]:
        """Record and return what stands for the whole run; call it once, when training is complete.

        Args:
            straggler: the process that the others waited for, in words, for the tag `straggler`.

        `summary/step_time`: what a step costs, seconds: the mean of all step times since this process started but the
        first WARMUP_STEPS (of all if there are no more) and, for the sake of shared machines, the fastest and slowest
        tenth; and each step's share of the time that refreshing the mask took. A mean, as the steps of a moving cut
        differ by design. `summary/<kind>/step_time`: the same of the steps of each kind, without refreshes.
        `summary/step_time_p50`, `_p95`, `_max`: of the same steps, of which none is left out.
        `summary/saving_…` and `summary/overhead_…`: see `Saving.metrics`; without perturbation the overhead is 0.
        `summary/density`: mean over the steps. `summary/top1`: the last evaluation's, percent;
        `summary/best_top1`: the best, also over what the run had before it was resumed.
        """
        summary: dict[str, float] = {}
        if self._step_times:
            refresh = self._refresh_seconds / len(self._step_times)
            summary["summary/step_time"] = _typical(self._step_times) + refresh
            times = self._step_times[WARMUP_STEPS:] or self._step_times
            summary["summary/step_time_p50"] = median(times)
            summary |= {f"summary/step_time_{name}": value for name, value in _slow_steps(times).items()}
        for kind, times in self._times_by_kind.items():
            summary[f"summary/{kind}/step_time"] = _typical(times)
        summary |= {f"summary/{key.replace('/', '_')}": value for key, value in self._saving.metrics().items()}
        if self._densities:
            summary["summary/density"] = sum(self._densities) / len(self._densities)
        if self._top1 is not None and self._best_top1 is not None:
            summary |= {"summary/top1": self._top1, "summary/best_top1": self._best_top1}
        # At step 0, because MLflow draws what has no other step as bars, one per run, instead of as a lone dot.
        self.log(summary, 0)
        if self._trackers:
            tags = {"straggler": straggler, "density": _rounded(summary.get("summary/density"))}
            tags[DESCRIPTION] = story(self._params, self._tags, summary)
            for key, value in tags.items():
                if value is not None:
                    self._tag(key, value)
        return summary

    def interface_lines(self) -> list[str]:
        """What to type and where to look to see the run; nothing where it is not tracked."""
        return [line for tracker in self._trackers for line in tracker.interface_lines()]

    def _tag(self, key: str, value: str) -> None:
        for tracker in self._trackers:
            tracker.tag(key, value)

    def _open(self) -> None:
        config = self._config
        if not config.tracking.trackers:
            return
        backend = config.sharding.backend_on(world_size())
        params = flatten(config) | self._extra_params
        tags = {"method": config.method, "backend": backend} | environment_tags(config.train.device)
        tags |= {"seed": str(config.train.seed), "mask": mask_words(config.method, params)}
        tags |= {"plan": plan_words(config.method, params)} | self._extra_tags
        tags[CONFIGURATION] = fingerprint(params, tags)
        if config.tracking.group is not None:
            tags["group"] = config.tracking.group
        self._params, self._tags = params, tags
        start = Start(
            name=config.tracking.run_name or f"{config.method} {config.model.name}",
            params=flatten(config) | all_without_secrets(self._extra_params),
            tags={key: shortened(without_secrets(value), _TAG_CHARACTERS) for key, value in tags.items()},
            step=self._step,
            resume_run_id=self._resume_run_id,
        )
        layers = None
        for name in config.tracking.trackers:
            tracker = TRACKERS[name].value(config)
            self._trackers.append(tracker)  # which is closed, should it fail to open
            earlier = tracker.open(start)
            self._best_top1 = self._best_top1 if earlier.best_top1 is None else earlier.best_top1
            self._saving.before = earlier.saved_seconds or self._saving.before
            layers = earlier.layers or layers
        self._layers = LayerRecorder(self.log_artifact, layers)

    def _mark_stuck(self, signal_name: str) -> None:
        # Called from another thread; should the main thread come back to life, it marks the run once more.
        for tracker in self._trackers:
            tracker.stuck(signal_name)

    def _close(self, error: BaseException | None) -> None:
        # Marking the run takes moments; a second signal in the meantime would leave it marked as running for ever.
        self.signals.shield()
        status, line = outcome(error)
        try:
            if status != "FINISHED":
                leave_note(status, line)
                status, line = read_note() or (status, line)
            if self._layers is not None:
                self._layers.close(_FINISH_S[status])
                self._layers = None
        finally:
            for tracker in self._trackers:
                tracker.close(status, line)
            self.signals.__exit__(None if error is None else type(error), error, None)

"""One training run as MLflow sees it: what it was, what it measured, how it ended."""

from __future__ import annotations

import logging
import math
import tempfile
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from statistics import median
from subprocess import Popen
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from ssam_scale.config.schema import Config
from ssam_scale.data.images import Images
from ssam_scale.errors import UserError
from ssam_scale.tracking import repetitions, watchdog
from ssam_scale.tracking.commands import interface_lines
from ssam_scale.tracking.data import dataset_input
from ssam_scale.tracking.dense import ascends_densely
from ssam_scale.tracking.describe import mask_words, plan_words, story
from ssam_scale.tracking.environment import environment_tags, world_size
from ssam_scale.tracking.identity import CONFIGURATION, fingerprint
from ssam_scale.tracking.layer_density import TABLE, LayerRecorder
from ssam_scale.tracking.moved import follow_moved
from ssam_scale.tracking.redaction import all_without_secrets, without_secrets
from ssam_scale.tracking.saving import Probe, Saving
from ssam_scale.tracking.shutdown import Unwinding, leave_note, outcome, read_note
from ssam_scale.tracking.spool import CLOSE_WITHIN_S, Writer, unsent_folder, waiting_text
from ssam_scale.tracking.store import (
    ANSWER_WITHIN_S,
    environment,
    experiment_id,
    flatten,
    is_permanent,
    one_line,
    open_store,
    plain_values,
    refusals,
    shortened,
    sqlite_path,
    text_artifact,
    within,
)
from ssam_scale.tracking.system import SystemMonitor
from ssam_scale.tracking.timer import PhaseSummary

if TYPE_CHECKING:
    from torch import nn

_log = logging.getLogger(__name__)

# Compilation, allocator growth and cold caches: these steps say nothing about the ones that follow.
WARMUP_STEPS = 10

# Limits of MLflow's stores.
_PARAMS_AT_ONCE, _TAG_CHARACTERS = 100, 8000
_STEP_SIZE = "steps_per_epoch"  # the tag by which steps of another size are known

# How long the last table and picture may take, for which no store is asked. Launchers kill for good 30 s after they ask
# politely.
_FINISH_S = {"FINISHED": 60.0, "FAILED": 6.0, "KILLED": 3.0}

# What is left for the end of a run whose store has not answered in the seconds before.
_SILENT_S = 2.0

# Of what is recorded once and nothing depends on, how long a store may take.
_ASIDE_S = 30.0


def open_run(
    config: Config,
    *,
    enabled: bool,
    resume_run_id: str | None = None,
    extra_tags: Mapping[str, str] | None = None,
    extra_params: Mapping[str, str] | None = None,
    gpus: int = 0,
) -> Run:
    """The run that `config` describes, to be entered with `with`.

    On entering, SIGTERM and SIGHUP become the exception `Terminated` (exit code 143 for SIGTERM) until the `with` ends.
    On leaving, the run is FINISHED, FAILED (with the error's line as tag `failure`) or KILLED (a signal, Ctrl-C).

    Args:
        config: the resolved configuration; logged as parameters and as the artifact `config.yaml`.
        enabled: true on the one process that tracks. On others every method does nothing, but signals unwind them too,
            and a failure there is what the run is marked by.
        resume_run_id: continue this run; a new one, tagged `resumed_from`, is made if the store does not know it, or
            if `extra_tags` say that an epoch has other steps than its.
        extra_tags: further tags, which win over the ones found out here (e.g. `backend` once it is resolved).
        extra_params: further parameters, which win over the configuration's (what it leaves to the machine).
        gpus: that it computes on, all processes together.

    Raises:
        UserError: on entering, when the tracking store cannot be used.
    """
    return Run(config, enabled, resume_run_id, dict(extra_tags or {}), dict(extra_params or {}), gpus)


def run_lines(uri: str, run_id: str) -> list[str]:
    """What to type and where to look to see a run that has ended; nothing if its store does not know it now."""
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
    """See `open_run`. `id` is MLflow's run id, `experiment` its experiment's; None on processes that do not track.

    `signals` are those that ask this process to end.
    """

    def __init__(
        self,
        config: Config,
        enabled: bool,
        resume_run_id: str | None,
        extra_tags: dict[str, str],
        extra_params: dict[str, str],
        gpus: int,
    ) -> None:
        self.id: str | None = None
        self.experiment: str | None = None
        self._config, self._enabled = config, enabled
        self._resume_run_id, self._extra_tags, self._extra_params = resume_run_id, extra_tags, extra_params
        self._client: Any = None
        self._writer: Writer | None = None
        self._layers: LayerRecorder | None = None
        self._watcher: Popen[bytes] | None = None
        self.signals = Unwinding(self._mark_stuck if enabled else None)
        self._step_times = array("d")
        self._times_by_kind: dict[str, array[float]] = {}
        self._refresh_seconds = 0.0
        self._saving = Saving(config.method, dense=ascends_densely(flatten(config)), gpus=gpus)
        self._densities = array("d")
        self._params: dict[str, str] = {}
        self._tags: dict[str, str] = {}
        self._began = 0.0
        self._close_within = CLOSE_WITHIN_S
        self._top1: float | None = None
        self._best_top1: float | None = None

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
        """Record metrics at an optimizer step. Returns at once; the values are sent in the background, in order.

        What a resumed run has recorded already at this step or a later one stays as it is.
        """
        if self._writer is not None:
            self._writer.log(metrics, step)

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
        self.log(times | self._saving.metrics(), step)

    def no_saving(self, reason: str) -> None:
        """Say why nothing will be known of the saving: the tag `saving`."""
        if self._writer is not None:
            self._writer.tag("saving", f"unknown: {reason}")

    def log_refresh(
        self,
        *,
        seconds: float,
        step: int,
        density: float | None = None,
        turnover: float = math.nan,
        samples: int | None = None,
    ) -> None:
        """Record that the mask was chosen anew before the step after `step`, which is part of what the method costs.

        Args:
            seconds: how long it took.
            step: steps done.
            density: share of all weights that the mask perturbs.
            turnover: share of them that the mask before did not perturb; not a number for the first.
            samples: images that were scored, if the scores are of samples.
        """
        self._refresh_seconds += seconds
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

        Returns when it is copied; it is sent in the background.
        """
        if self._writer is None:
            return
        try:
            self._writer.artifact(path, folder)
        except OSError as error:  # a full disk must not end a training
            _log.warning("artifact %s was not stored: %s", path, one_line(error))

    def log_text(self, text: str, name: str) -> None:
        """Store a text as the artifact `name`, a path; what fails is a warning, a full temporary folder too."""

        def store() -> None:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / Path(name).name
                path.write_text(text, encoding="utf-8")
                self.log_artifact(path, str(Path(name).parent))

        if self._writer is not None:
            self._try(f"artifact {name}", store)

    def log_data(self, images: Images, *, context: str, side: int) -> None:
        """Record which images the run reads, as a data set of MLflow: see `data.dataset_input`."""
        if self.id is not None:
            inputs = [dataset_input(images, context, side)]
            self._try("the data set", lambda: self._client.log_inputs(self.id, inputs), _ASIDE_S)

    def log_network(self, network: Callable[[], nn.Module], *, side: int, classes: int, step: int) -> None:
        """Store what was trained as a model of MLflow: see `network.log_network`. Takes some seconds.

        Args:
            network: makes it, on the CPU.
            side: of the square images, pixels.
            classes: that it tells apart.
            step: steps done.
        """
        if self.id is None or self.experiment is None:
            return
        from ssam_scale.tracking.network import log_network

        where = self._client, self.experiment, self.id

        def store() -> None:
            try:
                log_network(*where, network(), side=side, classes=classes, step=step)
            except TimeoutError:
                self._close_within = _SILENT_S  # it has been waited for
                raise

        self._try("the model", store)

    def watch_machine(self, node: str | None = None) -> AbstractContextManager[object]:
        """Within the `with`, what this machine does is recorded as `system/…`.

        Args:
            node: its name, where there are others; None: there are not.
        """
        return nullcontext() if self.id is None else SystemMonitor(self.log, self._began, node)

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
        if self._writer is not None:
            tags = {"straggler": straggler, "density": _rounded(summary.get("summary/density"))}
            tags["mlflow.note.content"] = story(self._params, self._tags, summary)
            for key, value in tags.items():
                if value is not None:
                    self._writer.tag(key, value)
        return summary

    def _try(self, what: str, store: Callable[[], object], seconds: float | None = None) -> None:
        """Store something that no training depends on: what fails, or takes longer, is a warning."""
        try:
            if seconds is None:
                store()
            else:
                within(seconds, store)
        except Exception as error:  # MLflow lets its stores' errors through, of every kind
            _log.warning("%s of run %s could not be stored: %s", what, self.id, one_line(error))

    def interface_lines(self) -> list[str]:
        """What to type and where to look to see the run in MLflow's own interface; nothing where it is not tracked."""
        if self.id is None or self.experiment is None:
            return []
        return interface_lines(self._config.tracking.uri, self.experiment, self.id)

    def _open(self) -> None:
        self._client = open_store(self._config.tracking.uri, create=True)
        with refusals(self._config.tracking.uri):
            self._record_start()

    def _record_start(self) -> None:
        uri, config = self._config.tracking.uri, self._config
        backend = config.sharding.backend_on(world_size())
        params = flatten(config) | self._extra_params
        tags = {"method": config.method, "backend": backend} | environment_tags(config.train.device)
        tags |= {"seed": str(config.train.seed), "mask": mask_words(config.method, params)}
        tags |= {"plan": plan_words(config.method, params)} | self._extra_tags
        tags[CONFIGURATION] = fingerprint(params, tags)
        if config.tracking.group is not None:
            tags["group"] = config.tracking.group
        self._params, self._tags = params, tags
        tags = {key: shortened(without_secrets(value), _TAG_CHARACTERS) for key, value in tags.items()}
        resumed = self._resume(tags) if self._resume_run_id else None
        if resumed is None:
            if self._resume_run_id:
                tags["resumed_from"] = self._resume_run_id
            name = config.tracking.run_name or f"{config.method} {config.model.name}"
            self.experiment = experiment_id(self._client, uri, config.tracking.experiment)
            info = self._client.create_run(self.experiment, tags=tags, run_name=name).info
            self.id, self._began = info.run_id, info.start_time / 1000.0
        name = f"{config.method} {config.model.name}"
        self._try("what it repeats", lambda: repetitions.adopt(*self._family(), name), _ASIDE_S)
        unsent = unsent_folder(config.checkpoint.directory, str(self.id))
        self._watcher = watchdog.start(uri, str(self.id), tags["process"], unsent)
        self._log_config({} if resumed is None else dict(resumed.data.params))
        table = waiting_text(unsent, TABLE)  # newer than what the store has
        if table is None and resumed is not None:
            table = text_artifact(self._client, str(self.id), TABLE)
        self._layers = LayerRecorder(self.log_artifact, table)
        if self._writer is None:
            self._writer = Writer(self._client, str(self.id), uri, unsent)
        if self._writer.furthest:
            self._writer.tag("metrics_from_step", str(self._writer.furthest + 1))

    def _family(self) -> tuple[Any, str, str]:
        """By which runs of other seeds are found."""
        assert self.experiment is not None
        return self._client, self.experiment, self._tags[CONFIGURATION]

    def _resume(self, tags: dict[str, str]) -> Any:
        """Reopen the run to be resumed; it as it was, or None if the store has no such run of steps of this size."""
        try:
            run = self._client.get_run(self._resume_run_id)
        except Exception as error:
            if not is_permanent(error):
                raise
            return None
        if run.info.lifecycle_stage == "deleted":
            return None
        if run.data.tags.get(_STEP_SIZE, tags.get(_STEP_SIZE)) != tags.get(_STEP_SIZE):
            return None  # its curves are of other steps, and the abandoned ones of them cannot be deleted
        uri, run_id = self._config.tracking.uri, str(self._resume_run_id)
        follow_moved(self._client.get_experiment(run.info.experiment_id), uri, sqlite_path(uri))
        unsent = unsent_folder(self._config.checkpoint.directory, run_id)
        # From here on nobody else sends what waits.
        self._writer = Writer(self._client, run_id, uri, unsent, goes_on=True)
        run = self._writer.resumed
        self.id, self.experiment = run_id, str(run.info.experiment_id)
        self._began = run.info.start_time / 1000.0
        self._best_top1 = run.data.metrics.get("summary/best_top1", run.data.metrics.get("val/top1"))
        self._saving.before = run.data.metrics.get("saving/seconds_so_far", 0.0)
        for key, value in (tags | {"resumed": str(int(run.data.tags.get("resumed", "0")) + 1)}).items():
            self._client.set_tag(self.id, key, value)
        self._client.update_run(self.id, status="RUNNING")  # by which process is said, should it fail from here on
        if "failure" in run.data.tags:
            self._client.delete_tag(self.id, "failure")
        return run

    def _log_config(self, known: dict[str, str]) -> None:
        from mlflow.entities import Param, RunTag

        # A parameter cannot change once it is logged; what a resumed run changes is kept as a tag.
        params, changed = [], []
        for key, value in {**flatten(self._config), **all_without_secrets(self._extra_params)}.items():
            if key not in known:
                params.append(Param(key, value))
            elif known[key] != value:
                changed.append(RunTag(f"changed.{key}", shortened(value, _TAG_CHARACTERS)))
        for start in range(0, len(params), _PARAMS_AT_ONCE):
            self._client.log_batch(self.id, params=params[start : start + _PARAMS_AT_ONCE])
        for start in range(0, len(changed), _PARAMS_AT_ONCE):
            self._client.log_batch(self.id, tags=changed[start : start + _PARAMS_AT_ONCE])
        try:
            self._client.log_text(self.id, yaml.safe_dump(plain_values(self._config), sort_keys=False), "config.yaml")
        except Exception as error:
            uri = without_secrets(self._config.tracking.uri)
            raise UserError(f"tracking.uri {uri}: its artifacts cannot be written: {one_line(error)}") from error

    def _mark_stuck(self, signal_name: str) -> None:
        # Called from another thread; should the main thread come back to life, it marks the run once more.
        if self.id is not None:
            self._mark("KILLED", signal_name)

    def _close(self, error: BaseException | None) -> None:
        # Marking the run takes moments; a second signal in the meantime would leave it marked as running for ever.
        self.signals.shield()
        try:
            status, line = outcome(error)
            if status != "FINISHED":
                leave_note(status, line)
                status, line = read_note() or (status, line)
            if self._layers is not None:
                self._layers.close(_FINISH_S[status])
                self._layers = None
            give_up = time.monotonic() + self._close_within
            marked = False
            if self._writer is not None:
                marked = self._writer.close(status, line, self._close_within)
                self._writer = None
                unsent = unsent_folder(self._config.checkpoint.directory, str(self.id))
                if unsent.exists():
                    with suppress(OSError):  # no more processes
                        watchdog.send_later(self._config.tracking.uri, unsent)
            elif self.id is not None:
                self._mark(status, line)
            if status == "FINISHED" and marked:
                rest = give_up - time.monotonic()
                self._try("the mean over seeds", lambda: repetitions.sum_up(*self._family()), rest)
        finally:
            if self._watcher is not None:
                watchdog.stop(self._watcher)
                self._watcher = None
            self.signals.__exit__(None if error is None else type(error), error, None)

    def _mark(self, status: str, line: str) -> None:
        """Tell the store how the run ended, other than by the records, which have not begun or are stuck."""

        def mark() -> None:
            # A launcher that asked politely does not wait long.
            with environment(MLFLOW_HTTP_REQUEST_MAX_RETRIES="0", MLFLOW_HTTP_REQUEST_TIMEOUT=str(ANSWER_WITHIN_S)):
                if line:
                    self._client.set_tag(self.id, "failure", line)
                self._client.set_terminated(self.id, status)

        try:
            within(CLOSE_WITHIN_S, mark)
        except Exception as error:  # the training is over; its result does not depend on the tracking store
            _log.warning("run %s could not be marked %s: %s", self.id, status, one_line(error))

"""MLflow: a run of a store, which may be away for a while; the tracker that everything else here can read back."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from subprocess import Popen
from typing import TYPE_CHECKING, Any

import yaml

from ssam_scale.config.schema import Config
from ssam_scale.errors import UserError
from ssam_scale.tracking import repetitions, watchdog
from ssam_scale.tracking.commands import interface_lines
from ssam_scale.tracking.data import dataset_input
from ssam_scale.tracking.identity import CONFIGURATION
from ssam_scale.tracking.layer_density import TABLE
from ssam_scale.tracking.moved import follow_moved
from ssam_scale.tracking.redaction import without_secrets
from ssam_scale.tracking.spool import CLOSE_WITHIN_S, Writer, unsent_folder, waiting_text
from ssam_scale.tracking.store import (
    ANSWER_WITHIN_S,
    check_store,
    environment,
    experiment_id,
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
from ssam_scale.tracking.tracker import TRACKERS, Earlier, Start, Tracker

if TYPE_CHECKING:
    from torch import nn

    from ssam_scale.data.images import Images

_log = logging.getLogger(__name__)

# Limits of MLflow's stores.
_PARAMS_AT_ONCE, _TAG_CHARACTERS = 100, 8000
_STEP_SIZE = "steps_per_epoch"  # the tag by which steps of another size are known
_FROM_STEP = "metrics_from_step"  # the tag that says where the points of a run that goes on begin

# What is left for the end of a run whose store has not answered in the seconds before.
_SILENT_S = 2.0

# Of what is recorded once and nothing depends on, how long a store may take.
_ASIDE_S = 30.0


@TRACKERS.register("mlflow", "a store of MLflow, `tracking.uri`; what `compare`, `send` and names of runs need")
class MLflowTracker(Tracker):
    """See `Tracker`. What a resumed run has recorded already at a step or a later one stays as it is."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._uri = config.tracking.uri
        self._id: str | None = None
        self._experiment: str | None = None
        self._client: Any = None
        self._writer: Writer | None = None
        self._watcher: Popen[bytes] | None = None
        self._configuration = ""
        self._began = 0.0
        self._close_within = CLOSE_WITHIN_S

    @classmethod
    def check(cls, config: Config) -> str:
        """See `Tracker.check`."""
        check_store(config.tracking.uri)
        return without_secrets(config.tracking.uri)

    @property
    def run_id(self) -> str | None:
        """MLflow's."""
        return self._id

    def open(self, start: Start) -> Earlier:
        """See `Tracker.open`."""
        self._client = open_store(self._uri, create=True)
        with refusals(self._uri):
            return self._record_start(start)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """See `Tracker.log`."""
        if self._writer is not None:
            self._writer.log(metrics, step)

    def tag(self, key: str, value: str) -> None:
        """See `Tracker.tag`."""
        if self._writer is not None:
            self._writer.tag(key, value)

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """See `Tracker.artifact`: of all files."""
        if self._writer is None:
            return
        try:
            self._writer.artifact(path, folder)
        except OSError as error:  # a full disk must not end a training
            _log.warning("artifact %s was not stored: %s", path, one_line(error))

    def data(self, images: Images, context: str, side: int) -> None:
        """As a data set of MLflow: see `data.dataset_input`."""
        inputs = [dataset_input(images, context, side)]
        self._try("the data set", lambda: self._client.log_inputs(self._id, inputs), _ASIDE_S)

    def network(self, network: Callable[[], nn.Module], *, side: int, classes: int, step: int) -> None:
        """As a model of MLflow: see `network.log_network`. Takes some seconds."""
        from ssam_scale.tracking.network import log_network

        assert self._experiment is not None
        assert self._id is not None
        where = self._client, self._experiment, self._id

        def store() -> None:
            try:
                log_network(*where, network(), side=side, classes=classes, step=step)
            except TimeoutError:
                self._close_within = _SILENT_S  # it has been waited for
                raise

        self._try("the model", store)

    def watching_machine(self, node: str | None) -> AbstractContextManager[object]:
        """As `system/…`, by MLflow's monitors."""
        return SystemMonitor(self.log, self._began, node)

    def interface_lines(self) -> list[str]:
        """MLflow's own interface."""
        if self._id is None or self._experiment is None:
            return []
        return interface_lines(self._uri, self._experiment, self._id)

    def stuck(self, signal_name: str) -> None:
        """See `Tracker.stuck`."""
        if self._id is not None:
            self._mark("KILLED", signal_name)

    def close(self, status: str, failure: str) -> None:
        """See `Tracker.close`."""
        try:
            give_up = time.monotonic() + self._close_within
            marked = False
            if self._writer is not None:
                marked = self._writer.close(status, failure, self._close_within)
                self._writer = None
                unsent = unsent_folder(self.config.checkpoint.directory, str(self._id))
                if unsent.exists():
                    with suppress(OSError):  # no more processes
                        watchdog.send_later(self._uri, unsent)
            elif self._id is not None:
                self._mark(status, failure)
            if status == "FINISHED" and marked:
                rest = give_up - time.monotonic()
                self._try("the mean over seeds", lambda: repetitions.sum_up(*self._family()), rest)
        finally:
            if self._watcher is not None:
                watchdog.stop(self._watcher)
                self._watcher = None

    def _try(self, what: str, store: Callable[[], object], seconds: float | None = None) -> None:
        """Store something that no training depends on: what fails, or takes longer, is a warning."""
        try:
            if seconds is None:
                store()
            else:
                within(seconds, store)
        except Exception as error:  # MLflow lets its stores' errors through, of every kind
            _log.warning("%s of run %s could not be stored: %s", what, self._id, one_line(error))

    def _record_start(self, start: Start) -> Earlier:
        config, tags = self.config, dict(start.tags)
        self._configuration = tags[CONFIGURATION]
        resumed = None if start.resume_run_id is None else self._resume(start.resume_run_id, tags)
        if resumed is None:
            if start.resume_run_id is not None:
                tags["resumed_from"] = start.resume_run_id
            elif start.step:  # what came before was not recorded here
                tags[_FROM_STEP] = str(start.step + 1)
            self._experiment = experiment_id(self._client, self._uri, config.tracking.experiment)
            info = self._client.create_run(self._experiment, tags=tags, run_name=start.name).info
            self._id, self._began = info.run_id, info.start_time / 1000.0
        name = f"{config.method} {config.model.name}"
        self._try("what it repeats", lambda: repetitions.adopt(*self._family(), name), _ASIDE_S)
        unsent = unsent_folder(config.checkpoint.directory, str(self._id))
        self._watcher = watchdog.start(self._uri, str(self._id), tags["process"], unsent)
        self._log_config(start.params, {} if resumed is None else dict(resumed.data.params))
        table = waiting_text(unsent, TABLE)  # newer than what the store has
        if table is None and resumed is not None:
            table = text_artifact(self._client, str(self._id), TABLE)
        if self._writer is None:
            self._writer = Writer(self._client, str(self._id), self._uri, unsent)
        if self._writer.furthest:
            self._writer.tag(_FROM_STEP, str(self._writer.furthest + 1))
        if resumed is None:
            return Earlier(layers=table)
        metrics = resumed.data.metrics
        best = metrics.get("summary/best_top1", metrics.get("val/top1"))
        return Earlier(best, metrics.get("saving/seconds_so_far", 0.0), table)

    def _family(self) -> tuple[Any, str, str]:
        """By which runs of other seeds are found."""
        assert self._experiment is not None
        return self._client, self._experiment, self._configuration

    def _resume(self, run_id: str, tags: dict[str, str]) -> Any:
        """Reopen the run to be resumed; it as it was, or None if the store has no such run of steps of this size."""
        try:
            run = self._client.get_run(run_id)
        except Exception as error:
            if not is_permanent(error):
                raise
            return None
        if run.info.lifecycle_stage == "deleted":
            return None
        if run.data.tags.get(_STEP_SIZE, tags.get(_STEP_SIZE)) != tags.get(_STEP_SIZE):
            return None  # its curves are of other steps, and the abandoned ones of them cannot be deleted
        follow_moved(self._client.get_experiment(run.info.experiment_id), self._uri, sqlite_path(self._uri))
        unsent = unsent_folder(self.config.checkpoint.directory, run_id)
        # From here on nobody else sends what waits.
        self._writer = Writer(self._client, run_id, self._uri, unsent, goes_on=True)
        run = self._writer.resumed
        self._id, self._experiment = run_id, str(run.info.experiment_id)
        self._began = run.info.start_time / 1000.0
        for key, value in (tags | {"resumed": str(int(run.data.tags.get("resumed", "0")) + 1)}).items():
            self._client.set_tag(self._id, key, value)
        self._client.update_run(self._id, status="RUNNING")  # by which process is said, should it fail from here on
        if "failure" in run.data.tags:
            self._client.delete_tag(self._id, "failure")
        return run

    def _log_config(self, wanted: Mapping[str, str], known: dict[str, str]) -> None:
        from mlflow.entities import Param, RunTag

        # A parameter cannot change once it is logged; what a resumed run changes is kept as a tag.
        params, changed = [], []
        for key, value in wanted.items():
            if key not in known:
                params.append(Param(key, value))
            elif known[key] != value:
                changed.append(RunTag(f"changed.{key}", shortened(value, _TAG_CHARACTERS)))
        for start in range(0, len(params), _PARAMS_AT_ONCE):
            self._client.log_batch(self._id, params=params[start : start + _PARAMS_AT_ONCE])
        for start in range(0, len(changed), _PARAMS_AT_ONCE):
            self._client.log_batch(self._id, tags=changed[start : start + _PARAMS_AT_ONCE])
        try:
            self._client.log_text(self._id, yaml.safe_dump(plain_values(self.config), sort_keys=False), "config.yaml")
        except Exception as error:
            uri = without_secrets(self._uri)
            raise UserError(f"tracking.uri {uri}: its artifacts cannot be written: {one_line(error)}") from error

    def _mark(self, status: str, line: str) -> None:
        """Tell the store how the run ended, other than by the records, which have not begun or are stuck."""

        def mark() -> None:
            # A launcher that asked politely does not wait long.
            with environment(MLFLOW_HTTP_REQUEST_MAX_RETRIES="0", MLFLOW_HTTP_REQUEST_TIMEOUT=str(ANSWER_WITHIN_S)):
                if line:
                    self._client.set_tag(self._id, "failure", line)
                self._client.set_terminated(self._id, status)

        try:
            within(CLOSE_WITHIN_S, mark)
        except Exception as error:  # the training is over; its result does not depend on the tracking store
            _log.warning("run %s could not be marked %s: %s", self._id, status, one_line(error))

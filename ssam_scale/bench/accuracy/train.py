"""One run of a study: `ssam-scale train` in a process of its own, and what its MLflow run says afterwards."""

from __future__ import annotations

import datetime
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from ssam_scale.child import command, environment
from ssam_scale.config.load import dump
from ssam_scale.config.study import LoadedStudy
from ssam_scale.data.split import Split
from ssam_scale.errors import UserError
from ssam_scale.tracking.compare.runs import Experiment, TrainedRun, find_experiment

from .cells import Cell

# In a run, so that the interval of its overhead means something.
_PROBES = 15

# How the trainer says that a run has no result, and not that something is amiss.
_DIVERGED = re.compile(r"error: (the loss became .*)")


class FailedRunError(UserError):
    """A run that ended without a result, for another reason than its knobs."""


class Trainer:
    """Does runs of a study.

    Args:
        loaded: the study.
        folder: of its results, its MLflow store and what a run needs while it goes on.
        split: its images.
    """

    def __init__(self, loaded: LoadedStudy, folder: Path, split: Split) -> None:
        self._loaded, self._folder, self._split = loaded, folder.absolute(), split
        self._uri = f"sqlite:///{self._folder}/mlflow.db"
        self._experiments: dict[str, Experiment] = {}
        self._running = self._folder / "running"
        shutil.rmtree(self._running, ignore_errors=True)  # of a command that was killed

    def run(self, cell: Cell, key: str) -> dict[str, Any]:
        """Train, and return the line of the results.

        Raises:
            FailedRunError: no result, and not because the loss became infinite, which is one.
        """
        assert cell.knobs is not None
        self._running.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._running) as temporary:
            place = Path(temporary)
            config, log = place / "config.yaml", self._folder / "last_run.log"
            config.write_text(dump(self._config(cell, key, place)), encoding="utf-8")
            began, started = time.monotonic(), datetime.datetime.now(datetime.timezone.utc)
            with log.open("w") as output:
                done = subprocess.run(
                    command(["train", "--config", str(config)]),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=environment(threads=1),
                    check=False,
                )
            seconds = time.monotonic() - began
        line: dict[str, Any] = {
            "key": key,
            "stage": cell.stage,
            "method": cell.method,
            "knobs": dict(cell.knobs),
            "seed": cell.seed,
            "epochs": cell.epochs,
            "started": started.isoformat(timespec="seconds"),
            "wall_seconds": round(seconds, 2),
        }
        if done.returncode == 0:
            return {**line, **_measured(self._read(cell, key))}
        text = log.read_text(errors="replace")
        if done.returncode == 2 and (diverged := _DIVERGED.search(text)):
            return {**line, "top1": None, "error": diverged[1]}
        said = [each for each in text.splitlines() if each.strip()] or ["nothing"]
        how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
        raise FailedRunError(f"{cell.name}: {how}: {said[-1][:300]} ({log})")

    def _config(self, cell: Cell, key: str, place: Path) -> Any:
        """The run's configuration: the study's, with images, store and probes of its own."""
        assert cell.knobs is not None
        final = cell.stage == "final"
        own: dict[str, Any] = {
            "train.epochs": cell.epochs,
            "train.seed": cell.seed,
            "train.eval_epochs": cell.epochs,
            "data.train": self._split.train.absolute(),
            "data.val": (self._split.val if final else self._split.tune).absolute(),
            "checkpoint": {"directory": str(place / "checkpoints"), "every_epochs": cell.epochs, "keep": 1},
        }
        config = self._loaded.config(cell.method, cell.knobs, own)
        steps = cell.epochs * (self._loaded.study.data.train // config.data.batch_size)
        own["tracking"] = {
            "uri": self._uri,
            "experiment": self._experiment(cell),
            "run_name": f"{cell.method} seed {cell.seed}",
            "group": key,
            "log_every": max(1, steps // _PROBES),
            # Tuning asks for accuracies only.
            "probe_every": max(1, steps // (_PROBES + 1)) if final else None,
            "log_model": False,
            "system_metrics": False,
        }
        return self._loaded.config(cell.method, cell.knobs, own)

    def _experiment(self, cell: Cell) -> str:
        """Those that are compared are together; tuning runs have seen other images."""
        return self._loaded.name if cell.stage == "final" else f"{self._loaded.name} tuning"

    def _read(self, cell: Cell, key: str) -> TrainedRun:
        name = self._experiment(cell)
        if name not in self._experiments:
            self._experiments[name] = find_experiment(self._uri, name)
        return self._experiments[name].runs(group=key)[-1]


def _measured(run: TrainedRun) -> dict[str, Any]:
    """Of a line, what the run itself has recorded."""
    over = [run.metric(f"summary/overhead_vs_base_percent{bound}") for bound in ("", "_low", "_high")]
    ratios = [None if percent is None else 1.0 + percent / 100.0 for percent in over]
    return {
        "top1": run.metric("summary/top1"),
        "seconds": run.seconds,
        "overhead": ratios[0],
        "overhead_low": ratios[1],
        "overhead_high": ratios[2],
        "commit": run.tags.get("git_commit", "unknown") + (" with changes" * (run.tags.get("git_dirty") == "true")),
        "hardware": run.tags.get("hardware", "unknown"),
        "versions": {key[8:]: value for key, value in sorted(run.tags.items()) if key.startswith("version/")},
        "run_id": run.id,
    }

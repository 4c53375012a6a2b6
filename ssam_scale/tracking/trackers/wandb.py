"""Weights & Biases: runs on this disk, which `wandb sync` takes to a server when somebody wants it."""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

from ssam_scale.config.schema import Config
from ssam_scale.errors import UserError
from ssam_scale.tracking.store import plain_values
from ssam_scale.tracking.tracker import DESCRIPTION, SUMMARY, TRACKERS, QueuedTracker, Start, check_installed


@TRACKERS.register("wandb", "Weights & Biases, offline unless WANDB_MODE says otherwise; `wandb sync` sends it")
class WandbTracker(QueuedTracker):
    """See `QueuedTracker`. Metrics are its history by optimizer step, those of a whole run its summary.

    It keeps the machine's metrics by itself. A process that goes on records under the same id, of which a small file
    beside the checkpoints knows, and how far it has come: W&B refuses steps that it has, and cannot forget them.
    """

    name = "Weights & Biases"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._run: Any = None
        self._recorded = -1  # step up to which an earlier process has
        self._step = 0
        self._tags: dict[str, str] = {}
        self._lines: list[str] = []

    @classmethod
    def check(cls, config: Config) -> str:
        """See `Tracker.check`."""
        check_installed("wandb", "wandb")
        return f"{_folder(config)}/wandb, {_mode()}"

    def begin(self, start: Start) -> None:
        """See `QueuedTracker.begin`."""
        # Its own errors would be reported over the network, also where it is offline.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        section, directory = self.config.tracking, self.config.checkpoint.directory
        directory.mkdir(parents=True, exist_ok=True)
        known = self._known() if start.step else None
        run_id, self._recorded = known or (uuid4().hex[:12], -1)
        self._step, self._tags = max(start.step, self._recorded), start.own_tags
        mode, place = _mode(), _folder(self.config) / "wandb"
        # W&B names the folder of a run by the second, and would write over one that went back to its checkpoint in it.
        while list(place.glob(f"*{datetime.now():%Y%m%d_%H%M%S}-{run_id}")):
            time.sleep(0.1)
        unstable: dict[str, Any] = {  # which other versions may not have
            "x_disable_stats": not section.system_metrics,
            "x_disable_meta": True,  # the command may have a password in it; ours is among the tags, without
            "x_save_requirements": False,
            "x_transaction_log_flush_interval": 1.0,  # seconds, which is what a killed process loses
        }
        self._run = wandb.init(
            project=section.experiment,
            name=start.name,
            group=section.group,
            id=run_id,
            resume="allow" if known is not None and mode == "online" else None,
            mode=mode,
            dir=str(place.parent),
            config={**plain_values(self.config), "tags": self._tags},
            settings=wandb.Settings(
                silent=True,  # what it prints would go through the progress bar
                console="off",
                disable_git=True,
                disable_code=True,
                **{key: value for key, value in unstable.items() if key in wandb.Settings.model_fields},
            ),
        )
        self._remember()
        if mode == "offline":
            self._lines = [f"send the run to Weights & Biases: wandb sync {place}/offline-run-*-{run_id}"]
        elif mode == "online":
            self._lines = [f"see the run in Weights & Biases: {self._run.url}"]

    def write_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """See `QueuedTracker.write_metrics`."""
        of_the_run = {key: value for key, value in metrics.items() if key.startswith(SUMMARY)}
        of_the_step = {key: value for key, value in metrics.items() if key not in of_the_run}
        if of_the_run:
            self._run.summary.update(of_the_run)
        if of_the_step and step > self._recorded:
            if step > self._step:
                self._step = step
                self._remember()
            self._run.log(of_the_step, step=step)

    def write_tag(self, key: str, value: str) -> None:
        """See `QueuedTracker.write_tag`."""
        if key == DESCRIPTION:
            self._run.notes = value
        else:
            self._tags[key] = value
            self._run.config.update({"tags": self._tags}, allow_val_change=True)

    def write_picture(self, name: str, png: bytes) -> None:
        """See `QueuedTracker.write_picture`."""
        import wandb
        from PIL import Image

        with Image.open(io.BytesIO(png)) as opened:
            self._run.log({f"picture/{name}": wandb.Image(opened.convert("RGB"))}, step=self._step)

    def end(self, status: str) -> None:
        """See `QueuedTracker.end`."""
        if self._run is not None:
            self._run.finish(exit_code=0 if status == "FINISHED" else 1)

    def interface_lines(self) -> list[str]:
        """How it gets to a server, or where it is."""
        return self._lines

    def _known(self) -> tuple[str, int] | None:
        """Id and last step of the run that these checkpoints are of; None: it is not known to have been recorded."""
        try:
            found = json.loads(_note(self.config).read_text())
            return str(found["id"]), int(found["step"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _remember(self) -> None:
        place = _note(self.config)
        partial = place.with_suffix(".partial")
        partial.write_text(json.dumps({"id": self._run.id, "step": self._step}))
        partial.replace(place)


def _note(config: Config) -> Path:
    return config.checkpoint.directory / "wandb.json"


def _folder(config: Config) -> Path:
    """In which W&B makes its own, `wandb`."""
    return Path(os.environ.get("WANDB_DIR") or config.checkpoint.directory)


def _mode() -> Literal["offline", "online", "disabled"]:
    """What somebody has set, and else offline.

    Raises:
        UserError: there is no such mode.
    """
    given = os.environ.get("WANDB_MODE") or "offline"
    if given in ("offline", "dryrun"):
        return "offline"
    if given in ("online", "run"):
        return "online"
    if given == "disabled":
        return "disabled"
    raise UserError(f"WANDB_MODE is {given}; it may be offline, online or disabled")

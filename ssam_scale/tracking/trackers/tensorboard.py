"""TensorBoard: an event file beside the checkpoints for each process of a run."""

from __future__ import annotations

import io
import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ssam_scale.config.schema import Config
from ssam_scale.tracking.store import plain_values
from ssam_scale.tracking.tracker import DESCRIPTION, TRACKERS, QueuedTracker, Start, check_installed


@TRACKERS.register("tensorboard", "event files in `tensorboard` of checkpoint.directory, for `tensorboard --logdir`")
class TensorBoardTracker(QueuedTracker):
    """See `QueuedTracker`. Metrics are scalars, pictures images, configuration, tags and the run's story texts.

    Not by torch's `SummaryWriter`, whose thread prints a traceback where a disk is full, but by the parts that it is
    made of. A process that goes on writes a further file into the folder, which begins by telling TensorBoard to forget
    what those before have from there on.
    """

    name = "TensorBoard"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._folder = _folder(config)
        self._file: io.BufferedWriter | None = None
        self._records: Any = None
        self._step = 0

    @classmethod
    def check(cls, config: Config) -> str:
        """See `Tracker.check`."""
        check_installed("tensorboard", "tensorboard")
        return str(_folder(config))

    def begin(self, start: Start) -> None:
        """See `QueuedTracker.begin`."""
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._folder.mkdir(parents=True, exist_ok=True)
        self._step = start.step
        # By their names files are read in order: the time of two that are made within a second is the same in seconds.
        stamp = f"{time.time():017.6f}".replace(".", "")
        name = f"events.out.tfevents.{stamp}.{socket.gethostname()}.{os.getpid()}"
        self._file = (self._folder / name).open("xb")
        self._records = RecordWriter(self._file)
        self._write(file_version="brain.Event:2")
        # The mark by which TensorBoard drops what was recorded at this step and later: by a run before in this folder,
        # or by a process that had come further than its last checkpoint. What is at step 0 stays.
        first = start.step + 1 if start.step else 0
        self._write(step=first, session_log=SessionLog(status=SessionLog.START))
        config = yaml.safe_dump(plain_values(self.config), sort_keys=False)
        self._text("config", "\n".join(f"    {line}" for line in config.splitlines()))
        rows = [f"| {key} | {_cell(value)} |" for key, value in start.own_tags.items()]
        self._text("tags", "\n".join([f"**{start.name}**", "", "| tag | value |", "|---|---|", *rows]))
        self._file.flush()

    def write_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """See `QueuedTracker.write_metrics`."""
        from torch.utils.tensorboard.summary import scalar

        for key, value in metrics.items():
            self._write(step=step, summary=scalar(key, float(value)))
        self._step = max(step, self._step)
        self._flush()

    def write_tag(self, key: str, value: str) -> None:
        """See `QueuedTracker.write_tag`."""
        self._text("description" if key == DESCRIPTION else f"tag/{key}", value)
        self._flush()

    def write_picture(self, name: str, png: bytes) -> None:
        """See `QueuedTracker.write_picture`."""
        from PIL import Image
        from torch.utils.tensorboard.summary import image

        with Image.open(io.BytesIO(png)) as opened:
            pixels = np.asarray(opened.convert("RGB"))
        self._write(step=self._step, summary=image(name, pixels, dataformats="HWC"))
        self._flush()

    def end(self, status: str) -> None:
        """See `QueuedTracker.end`."""
        if self._file is not None:
            with suppress(OSError):  # what a full disk did not take was said
                self._file.close()

    def interface_lines(self) -> list[str]:
        """TensorBoard's own interface."""
        return [f"see the run in TensorBoard: tensorboard --logdir {self._folder}"]

    def _text(self, name: str, text: str) -> None:
        from torch.utils.tensorboard.summary import text as text_of

        self._write(step=self._step, summary=text_of(name, text))

    def _write(self, **what: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._records.write(Event(wall_time=time.time(), **what).SerializeToString())

    def _flush(self) -> None:
        assert self._file is not None
        self._file.flush()


def _folder(config: Config) -> Path:
    return config.checkpoint.directory / "tensorboard"


def _cell(value: str) -> str:
    return value.replace("|", r"\|").replace("\n", " ")

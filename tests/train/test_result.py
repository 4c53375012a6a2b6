"""`result.json`: what a complete run came to, beside its checkpoints, for whom no tracking store is there."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from ssam_scale.tracking.shutdown import SAVED
from ssam_scale.tracking.store import open_store
from ssam_scale.train import loop
from ssam_scale.train.build import build_hooks
from ssam_scale.train.hooks import Hook
from ssam_scale.train.progress import Progress
from tests.support.processes import run
from tests.support.runs import ssam_scale, write_config

STEPS_PER_EPOCH = 4  # of `write_config`: 48 images in batches of 12


class Interrupted(Hook):
    """Sends SIGTERM to its own process when an epoch's last step is done."""

    def __init__(self, epoch: int) -> None:
        self._epoch = epoch

    def after_epoch(self, progress: Progress) -> None:
        if progress.epoch == self._epoch:
            os.kill(os.getpid(), signal.SIGTERM)


def result(home: Path, folder: str = "checkpoints") -> dict[str, Any]:
    text = (home / folder / "result.json").read_text()
    found: dict[str, Any] = json.loads(text, parse_constant=pytest.fail)
    return found


def test_it_holds_the_last_evaluation_as_the_run_has_it(data: Path, home: Path) -> None:
    config = write_config(home / "run.yaml", data, train={"epochs": 2, "ema_decay": 0.5})
    assert ssam_scale("train", "--config", config) == 0
    found = result(home)
    run = open_store(f"sqlite:///{home}/mlflow.db", create=False).get_run(found.pop("run_id"))
    recorded = run.data.metrics
    assert found == {
        "method": "base",
        "model": "resnet18",
        "top1": recorded["val/top1"],  # of the averaged weights
        "top5": None,  # four classes
        "loss": recorded["val/loss"],
        "images": 20,
        "epochs": 2,
        "steps": 2 * STEPS_PER_EPOCH,
        "stopped_early": False,
    }
    assert recorded["summary/top1"] == found["top1"]


@pytest.mark.slow
def test_an_interrupted_run_has_none_and_the_resumed_one_that_of_the_whole(data: Path, home: Path) -> None:
    config = write_config(home / "run.yaml", data)
    assert ssam_scale("train", "--config", config, f"checkpoint.directory={home}/whole") == 0
    with pytest.MonkeyPatch.context() as patch:
        for epoch in (1, 2):  # before an evaluation in the middle, and before the last
            patch.setattr(loop, "build_hooks", lambda *args, epoch=epoch: [Interrupted(epoch), *build_hooks(*args)])
            assert ssam_scale("train", "--config", config, "--resume", "auto") == SAVED
            assert not (home / "checkpoints" / "result.json").exists()
    assert ssam_scale("train", "--config", config, "--resume", "auto") == 0
    whole, resumed = result(home, "whole"), result(home)
    assert resumed.pop("run_id") != whole.pop("run_id")
    assert resumed == whole
    # A run that is made longer keeps what it was until it is complete again.
    assert ssam_scale("train", "--config", config, "--resume", "auto", "train.epochs=3") == 0
    assert (result(home)["epochs"], result(home)["steps"]) == (3, 3 * STEPS_PER_EPOCH)


@pytest.fixture
def full(home: Path) -> Iterator[Path]:
    """Where the file is prepared: a file of another disk, which is full."""
    disk, partial = home / "disk", home / "checkpoints" / ".result.json.partial"
    disk.mkdir()
    partial.parent.mkdir()
    partial.touch()
    if os.geteuid() or run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], cwd=home).returncode:
        pytest.skip("only root may mount a disk")
    try:
        (disk / "partial").touch()
        run(["mount", "--bind", disk / "partial", partial], cwd=home)
        with suppress(OSError), (disk / "filling").open("wb", buffering=0) as file:
            while True:
                file.write(b"x" * 4096)
        yield partial
    finally:
        for mounted in (partial, disk):
            run(["umount", "--lazy", mounted], cwd=home)


def test_a_disk_without_room_for_it_is_a_line(
    data: Path, home: Path, full: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(home / "run.yaml", data, train={"epochs": 1})
    assert ssam_scale("train", "--config", config) == 0
    assert "result.json was not written: No space left on device" in capsys.readouterr().out
    assert {path.name for path in full.parent.iterdir()} == {"epoch_0001", full.name}


def test_what_cannot_be_replaced_is_a_line_and_leaves_no_half(
    data: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "checkpoints" / "result.json").mkdir(parents=True)
    config = write_config(home / "run.yaml", data, train={"epochs": 1})
    assert ssam_scale("train", "--config", config) == 0
    assert "result.json was not written: Is a directory" in capsys.readouterr().out
    assert {path.name for path in (home / "checkpoints").iterdir()} == {"epoch_0001", "result.json"}

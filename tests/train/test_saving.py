"""When a run is saved, and what becomes of a checkpoint that cannot be written beside training."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ssam_scale.config.load import load
from ssam_scale.config.schema import Config
from ssam_scale.errors import UserError
from ssam_scale.perturbation import no_phases
from ssam_scale.sharding import World
from ssam_scale.tracking.run import open_run
from ssam_scale.train import checkpoint
from ssam_scale.train.agreement import Agreement
from ssam_scale.train.build import Components, build
from ssam_scale.train.checkpoint.writer import BackgroundWriter
from ssam_scale.train.evaluation import Evaluate
from ssam_scale.train.progress import ProgressBar
from tests.support.processes import wait_until
from tests.support.runs import VIT, run_length, write_config


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@contextmanager
def saving(config: Config, components: Components, clock: Clock) -> Iterator[checkpoint.SaveCheckpoint]:
    """The hook of a run on one process."""
    world, agreement = World(), Agreement(World())
    with open_run(config, enabled=False) as run, ProgressBar(1, 0, visible=False) as bar:
        evaluate = Evaluate(config, world, components, run, bar, agreement)
        yield checkpoint.SaveCheckpoint(config, world, components, run.signals, evaluate, bar, agreement, clock)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, data: Path) -> tuple[Config, Components]:
    home = tmp_path_factory.mktemp("run")
    config = load(write_config(home / "run.yaml", data, model=VIT), [])
    return config, build(config, World(), no_phases, run_length(config))


def configured(config: Config, directory: Path, **values: Any) -> Config:
    section = config.checkpoint.model_copy(update={"directory": directory, **values})
    return config.model_copy(update={"checkpoint": section})


def saved(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob("*"))


def test_no_more_than_so_many_minutes_are_lost(built: tuple[Config, Components], tmp_path: Path) -> None:
    config, components = configured(built[0], tmp_path, every_minutes=10.0, keep=9), built[1]
    clock, progress = Clock(), components.progress
    progress.epoch = progress.seen = progress.step = 0
    with saving(config, components, clock) as hook:
        for minute in (5, 9.9, 10.5, 11, 20, 20.6, 20.7):
            clock.now = 1000.0 + 60.0 * minute
            progress.after_step()
            hook.after_step(progress, None)  # type: ignore[arg-type]
        hook.on_end(None)
    # At 10.5, and ten minutes after that was begun.
    assert saved(tmp_path) == ["epoch_0000_step_000003", "epoch_0000_step_000006"]


def test_steps_and_epochs_are_counted_since_the_run_began(built: tuple[Config, Components], tmp_path: Path) -> None:
    config = configured(built[0], tmp_path, every_steps=3, every_epochs=2, every_minutes=None, keep=9)
    components, progress = built[1], built[1].progress
    progress.epoch = progress.seen = progress.step = 0
    with saving(config, components, Clock()) as hook:
        for _ in range(2):
            for _ in range(4):
                progress.after_step()
                hook.after_step(progress, None)  # type: ignore[arg-type]
            progress.after_epoch()
            hook.between_epochs(progress)
        hook.on_end(None)
    assert saved(tmp_path) == ["epoch_0000_step_000003", "epoch_0001_step_000006", "epoch_0002"]


def test_what_cannot_be_written_beside_training_ends_the_run_at_the_next_step(
    built: tuple[Config, Components], tmp_path: Path
) -> None:
    (tmp_path / "taken").touch()
    config, components = configured(built[0], tmp_path / "taken", every_steps=1), built[1]
    with saving(config, components, Clock()) as hook:
        components.progress.after_step()
        hook.after_step(components.progress, None)  # type: ignore[arg-type]
        wait_until(lambda: bool(hook._writer.failure()), 60, "the failure")
        with pytest.raises(UserError, match=r"^checkpoint\.directory: .*taken/epoch_.* was not written: .*are free"):
            hook.after_step(components.progress, None)  # type: ignore[arg-type]
        hook.on_end(UserError())  # says nothing more


def test_one_thing_is_written_after_another() -> None:
    writer, go, events = BackgroundWriter(), threading.Event(), []

    def first() -> str:
        go.wait()
        events.append("first")
        return "no room"

    def second() -> str:
        events.append("second")
        return ""

    writer.start(first)
    assert writer.failure() == ""  # not known yet
    threading.Timer(0.05, go.set).start()
    writer.start(second)
    assert writer.wait() == "no room"
    assert events == ["first", "second"]

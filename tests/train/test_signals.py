"""A run that a signal asks to end is saved at the end of a step, on all processes, and goes on from there."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from ssam_scale.cli.main import main
from ssam_scale.config.load import load
from ssam_scale.tracking import shutdown
from ssam_scale.tracking.run import open_run
from ssam_scale.tracking.shutdown import ENDING, SAVED, Terminated, Unwinding
from ssam_scale.tracking.store import open_store
from ssam_scale.train import loop
from ssam_scale.train.build import build_hooks
from ssam_scale.train.checkpoint import newest
from ssam_scale.train.checkpoint.files import read_state
from ssam_scale.train.hooks import Hook
from ssam_scale.train.progress import Progress
from tests.support.processes import free_port, wait_until
from tests.support.ranks import start_fresh_rank
from tests.support.runs import differing, ssam_scale, train_on_ranks, write_config

pytestmark = pytest.mark.slow

# Far more steps than are taken between the first checkpoint and the signal that follows it.
LONG: dict[str, Any] = {
    "train": {"epochs": 60, "eval_epochs": 60, "ema_decay": 0.9},
    "loss": {"mixup": 0.2},
    "perturbation": {"rho": 0.05, "norm": "masked", "mask": {"pattern": "depth"}},
    "checkpoint": {"every_steps": 3, "every_epochs": 60},
}


def in_a_terminal(arguments: list[str]) -> None:
    """The command where Ctrl-C means something: in the background of a shell it is ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main(arguments)


def interrupt(config: Path, processes: int, number: signal.Signals, log: Path, *overrides: str) -> str:
    """Train until something new is saved, and send a signal to the last process alone; what all of them said."""
    checkpoints = config.parent / "checkpoints"
    before, port = newest(checkpoints), free_port()
    logs = [log.with_suffix(f".{rank}") for rank in range(processes)]
    arguments = ["train", "--config", str(config), "--resume", "auto", *overrides]
    ranks = [start_fresh_rank(rank, processes, port, file, in_a_terminal, arguments) for rank, file in enumerate(logs)]
    try:
        wait_until(lambda: newest(checkpoints) != before or not ranks[-1].is_alive(), 120, "a checkpoint")
        os.kill(ranks[-1].pid, number)
        for rank in ranks:
            rank.join(120)
        said = "".join(file.read_text() for file in logs)
        assert [rank.exitcode for rank in ranks] == [SAVED] * processes, said
        return said
    finally:
        for rank in ranks:
            rank.kill()


@pytest.mark.parametrize(
    ("processes", "numbers"),
    [
        (2, [signal.SIGTERM]),
        pytest.param(1, [signal.SIGUSR1, signal.SIGINT], marks=pytest.mark.exhaustive),
        pytest.param(1, [signal.SIGTERM, signal.SIGHUP], marks=pytest.mark.exhaustive),
        pytest.param(2, [signal.SIGUSR1, signal.SIGHUP, signal.SIGINT], marks=pytest.mark.exhaustive),
    ],
)
def test_interrupted_runs_end_where_they_would_have(
    processes: int, numbers: list[signal.Signals], data: Path, home: Path
) -> None:
    config = write_config(home / "run.yaml", data, **LONG)
    train_on_ranks(processes, config, f"checkpoint.directory={home}/whole", f"tracking.uri=sqlite:///{home}/whole.db")
    for number in numbers:
        said = interrupt(config, processes, number, home / number.name)
        saved = newest(home / "checkpoints")
        assert saved is not None
        assert f"{number.name}: saved as {saved}; --resume auto goes on from it" in said
        assert "Traceback" not in said
        store = open_store(f"sqlite:///{home}/mlflow.db", create=False)
        (run,) = store.search_runs([store.get_experiment_by_name("ssam_scale").experiment_id])
        assert run.info.status == "KILLED"
        assert run.data.tags["failure"].endswith(f"{number.name}, saved as {saved.name}")
    train_on_ranks(processes, config, "checkpoint.resume=auto")
    assert differing(home / "whole/epoch_0060", home / "checkpoints/epoch_0060") == []


class SignalBeforeEvaluation(Hook):
    """Sends SIGTERM to its own process when the first epoch's last step is done."""

    def after_epoch(self, progress: Progress) -> None:
        if progress.epoch == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def test_an_evaluation_is_left_and_comes_after_the_run_is_resumed(
    data: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sections = {"train": {"epochs": 1, "ema_decay": 0.9}, "perturbation": LONG["perturbation"]}
    config = write_config(home / "run.yaml", data, **sections)
    assert ssam_scale("train", "--config", config, f"checkpoint.directory={home}/whole") == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "build_hooks", lambda *args: [SignalBeforeEvaluation(), *build_hooks(*args)])
        assert ssam_scale("train", "--config", config) == SAVED
    saved = newest(home / "checkpoints")
    assert saved is not None
    assert saved.name == "epoch_0001"
    assert read_state(saved)["evaluation"] is None
    capsys.readouterr()
    assert ssam_scale("train", "--config", config, "--resume", "auto") == 0
    said = capsys.readouterr().out
    assert f"resumed from {saved} after epoch 1" in said
    assert "epoch 1/1: top-1" in said
    assert differing(home / "whole/epoch_0001", home / "checkpoints/epoch_0001") == []


def test_a_step_that_does_not_end_is_left_and_a_checkpoint_that_is_written_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shutdown, "PATIENCE_S", 2.0)  # from the signal to who looks at it, also on a busy machine
    with Unwinding() as signals, signals.deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == signal.SIGTERM
        signals.take_your_time()
        os.kill(os.getpid(), signal.SIGTERM)  # by Slurm, and by the launcher that it has told, too
        time.sleep(2.5)
    monkeypatch.setattr(shutdown, "PATIENCE_S", 0.05)
    with Unwinding() as signals, signals.deferred():
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.2)  # it came early enough
        with pytest.raises(Terminated) as ended:
            terminated_at_last()
    assert ended.value.code == 128 + signal.SIGUSR1


def test_ctrl_c_waits_for_the_end_of_a_step_and_a_second_one_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with Unwinding() as signals:
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)  # nothing is trained
            assert signals.received is None
            monkeypatch.setattr(shutdown, "_AGAIN_AFTER_S", 3600.0)
            with signals.deferred():
                for _ in range(2):  # the terminal's, and what a launcher makes of it
                    signal.raise_signal(signal.SIGINT)
                assert signals.received == signal.SIGINT
                monkeypatch.setattr(shutdown, "_AGAIN_AFTER_S", 0.0)
                with pytest.raises(KeyboardInterrupt):
                    signal.raise_signal(signal.SIGINT)
                signals.take_your_time()
                signal.raise_signal(signal.SIGINT)  # what is being written gets written
        monkeypatch.setattr(shutdown, "PATIENCE_S", 0.05)
        with Unwinding() as signals, signals.deferred(), pytest.raises(KeyboardInterrupt):
            interrupted_at_last()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_once_a_run_is_saved_no_further_signal_changes_its_exit_code(data: Path, home: Path) -> None:
    """torchrun sends SIGTERM to the ranks that are left when the first one has ended."""
    config = load(write_config(home / "run.yaml", data), [])
    handlers = {number: signal.getsignal(number) for number in ENDING}
    try:
        with pytest.raises(Terminated) as ended, open_run(config, enabled=False):
            raise Terminated(signal.SIGTERM, saved="epoch_0001")
        for number in ENDING:
            os.kill(os.getpid(), number)  # while processes part
        assert ended.value.code == SAVED
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def interrupted_at_last() -> None:
    signal.raise_signal(signal.SIGINT)
    time.sleep(60.0)


def terminated_at_last() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    while True:
        time.sleep(0.01)

"""Hooks are called around the steps and epochs of a real run, and told how it ends."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ssam_scale.cli.main import main
from ssam_scale.perturbation import StepReport
from ssam_scale.train import loop
from ssam_scale.train.batches import EpochBatches
from ssam_scale.train.build import build_hooks
from ssam_scale.train.hooks import Hook, ending
from ssam_scale.train.progress import Progress
from tests.support.runs import ssam_scale, write_config
from tests.support.tracked import STEPS, client, train

INTERVAL = {"rho": 0.05, "interval": 2}


class Recorder(Hook):
    """Notes every call, in a list that hooks may share."""

    def __init__(self, calls: list[Any], name: str = "hook") -> None:
        self.calls, self.name = calls, name

    def before_step(self, progress: Progress, batches: EpochBatches) -> None:
        [batch, *_] = batches.ahead(1)
        self.calls.append(("before step", progress.epoch, progress.step, len(batch.labels)))

    def after_step(self, progress: Progress, report: StepReport) -> None:
        assert report.loss is not None
        self.calls.append(("after step", progress.epoch, progress.step, report.kind))

    def after_epoch(self, progress: Progress) -> None:
        self.calls.append(("after epoch", progress.epoch, progress.step))

    def on_end(self, error: BaseException | None) -> None:
        self.calls.append((f"{self.name} ends", error))


class Failing(Recorder):
    """Raises after a step, or at the end."""

    def __init__(self, calls: list[Any], name: str, *, step: int | None = None) -> None:
        super().__init__(calls, name)
        self.step = step

    def after_step(self, progress: Progress, report: StepReport) -> None:
        if progress.step == self.step:
            raise RuntimeError(f"step {self.step}")

    def on_end(self, error: BaseException | None) -> None:
        super().on_end(error)
        if self.step is None:
            raise ValueError(self.name)


def add_hooks(monkeypatch: pytest.MonkeyPatch, hooks: Sequence[Hook]) -> None:
    """To those of the run."""
    monkeypatch.setattr(loop, "build_hooks", lambda *args: [*build_hooks(*args), *hooks])


@pytest.mark.slow
def test_a_hook_sees_every_step_and_epoch_in_order(home: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    add_hooks(monkeypatch, [Recorder(calls)])
    run = train(home, data, {"pattern": "depth", "cut": 0.5, "policy": "fixed"}, interval=2)
    expected: list[Any] = []
    for epoch in range(2):
        for step in range(epoch * STEPS, (epoch + 1) * STEPS):
            expected += [
                ("before step", epoch, step, 12),
                ("after step", epoch, step + 1, "base" if step % 2 else "sparse"),
            ]
        expected.append(("after epoch", epoch + 1, (epoch + 1) * STEPS))
    assert calls == [*expected, ("hook ends", None)]
    metrics = run.data.metrics
    assert {
        "time/step",
        "time/base/step",
        "time/sparse/step",
        "time/sparse/perturb",
        "time/base/data",
    } <= metrics.keys()
    assert not {"time/base/perturb", "time/dense/step", "time/base/ascent_forward"} & metrics.keys()
    assert {"summary/step_time", "summary/base/step_time", "summary/sparse/step_time"} <= metrics.keys()


def test_every_hook_is_told_of_an_exception_which_ends_the_run(
    home: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    add_hooks(monkeypatch, [Failing(calls, "first", step=3), Recorder(calls, "second")])
    config = write_config(home / "run.yaml", data, perturbation=INTERVAL)
    with pytest.raises(RuntimeError, match="step 3"):
        main(["train", "--config", str(config)])
    # The third step ended for the hooks before the one that failed only.
    assert [call[:3] for call in calls if call[0] == "after step"] == [("after step", 0, 1), ("after step", 0, 2)]
    ends = calls[-2:]
    assert [name for name, _ in ends] == ["first ends", "second ends"]
    assert all(str(error) == "step 3" for _, error in ends)
    (run,) = client(home).search_runs([client(home).get_experiment_by_name("ssam_scale").experiment_id])
    assert (run.info.status, run.data.tags["failure"]) == ("FAILED", "RuntimeError: step 3")
    assert "summary/step_time" not in run.data.metrics


def test_a_hook_that_fails_at_the_end_does_not_keep_others_from_it() -> None:
    calls: list[Any] = []
    hooks = [Recorder(calls, "first"), Failing(calls, "second"), Recorder(calls, "third")]
    with pytest.raises(ValueError, match="second"), ending(hooks):
        pass
    assert [name for name, _ in calls] == ["first ends", "second ends", "third ends"]
    assert [str(error) for _, error in calls] == ["None", "None", "second"]


def test_a_dry_run_takes_one_step_with_the_hooks_of_a_run(
    home: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    add_hooks(monkeypatch, [Recorder(calls)])
    config = write_config(home / "run.yaml", data, perturbation=INTERVAL)
    assert ssam_scale("train", "--config", config, "--dry-run") == 0
    assert calls == [("before step", 0, 0, 12), ("after step", 0, 1, "dense"), ("hook ends", None)]

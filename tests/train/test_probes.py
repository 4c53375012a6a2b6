"""Probes of a real run: training is what it is without them, and the run shows what it has saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ssam_scale.train.probes import ProbeSaving
from tests.support.runs import differing, ssam_scale, train_on_ranks, write_config
from tests.support.tiers import few
from tests.support.tracked import client

RUN: dict[str, Any] = {
    "loss": {"mixup": 0.2},
    "perturbation": {"rho": 0.05, "norm": "masked", "mask": {"pattern": "depth"}, "direction": {"fraction": 0.5}},
    "train": {"epochs": 3, "ema_decay": 0.9},
}
SAVING = ("saving/vs_dense_percent", "saving/seconds_so_far", "overhead/vs_base_percent")


def runs_of(home: Path) -> list[Any]:
    """The tracked ones, the first first."""
    store = client(home)
    return store.search_runs([store.get_experiment_by_name("ssam_scale").experiment_id], order_by=["start_time"])


@pytest.mark.slow
def test_a_run_trains_as_without_and_shows_its_saving(data: Path, home: Path) -> None:
    config = write_config(home / "run.yaml", data, **RUN)
    for every in ("null", "2"):
        options = [f"tracking.probe_every={every}", f"checkpoint.directory={home}/{every}"]
        assert ssam_scale("train", "--config", config, *options) == 0
    assert differing(home / "null/epoch_0003", home / "2/epoch_0003") == []
    plain, probed = runs_of(home)
    assert plain.data.tags["saving"] == "unknown: tracking.probe_every is null"
    assert not [name for name in plain.data.metrics if name.startswith(("saving/", "probe/"))]
    metrics = probed.data.metrics
    assert "saving" not in probed.data.tags
    assert probed.data.tags["predicted"].startswith("unknown: tracking.cost_times names no file")
    assert "time than dense SAM**" in probed.data.tags["mlflow.note.content"]
    assert {step.step for step in client(home).get_metric_history(probed.info.run_id, "time/probe")} == {2, 4, 6, 8, 10}
    for name in SAVING:
        assert metrics[name] == metrics[f"summary/{name.replace('/', '_')}"]
    for name in SAVING[::2]:
        assert metrics[f"{name}_low"] <= metrics[f"{name}_high"]
    # Of times beside other programs, of which either sign may come out: both figures of the saving have it.
    assert metrics["saving/seconds_so_far"] * metrics["saving/vs_dense_percent"] >= 0.0


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([], "12 steps are too few for probes of 1% (tracking.probe_every asks for them)"),
        (["tracking.probe_every=null"], None),
        (["perturbation=null"], None),
    ],
    ids=["too short", "not wanted", "base"],
)
def test_why_there_is_none(
    data: Path, home: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], said: str | None
) -> None:
    config = write_config(home / "run.yaml", data, **RUN)
    assert ssam_scale("train", "--config", config, *overrides) == 0
    [run] = runs_of(home)
    out = capsys.readouterr().out
    assert ("the saving is not measured" in out) == (said is not None)
    if said is not None:
        assert f"the saving is not measured: {said}\n" in out
        assert run.data.tags["saving"] == f"unknown: {said}"
    if run.data.tags["method"] == "base":
        assert run.data.metrics["summary/overhead_vs_base_percent"] == 0.0


def test_where_dense_sam_would_not_fit_there_are_no_probes(
    data: Path, home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU's memory is asked once, before the first of them."""
    asked: list[None] = []
    monkeypatch.setattr(ProbeSaving, "_fits", lambda self: asked.append(None))
    config = write_config(home / "run.yaml", data, **RUN)
    assert ssam_scale("train", "--config", config, "tracking.probe_every=2") == 0
    said = "dense SAM's backup of all weights does not fit into memory beside this run"
    assert capsys.readouterr().out.count(f"the saving is not measured: {said}\n") == len(asked) == 1
    [run] = runs_of(home)
    assert run.data.tags["saving"] == f"unknown: {said}"


@pytest.mark.slow
@pytest.mark.parametrize("backend", few(["ddp", "fsdp2", "zero2"], "zero2"))
def test_two_processes_train_as_without(data: Path, home: Path, backend: str) -> None:
    config = write_config(home / "run.yaml", data, **RUN)
    for every in ("null", "3"):
        options = [f"tracking.probe_every={every}", f"checkpoint.directory={home}/{every}"]
        train_on_ranks(2, config, f"sharding.backend={backend}", *options)
    assert differing(home / "null/epoch_0003", home / "3/epoch_0003") == []
    assert SAVING[0] in runs_of(home)[1].data.metrics

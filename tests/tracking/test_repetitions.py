"""Runs that differ in their seed alone have a parent with their mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from ssam_scale.config.schema import Config
from ssam_scale.tracking.identity import CONFIGURATION, KIND
from ssam_scale.tracking.repetitions import PARENT, adopt
from ssam_scale.tracking.run import Run, open_run
from ssam_scale.tracking.store import open_store
from ssam_scale.tracking.timer import PhaseSummary

MakeConfig = Callable[..., Config]


def finished(config: Config, top1: float) -> Run:
    with open_run(config, enabled=True) as run:
        run.log_window(PhaseSummary({}, (0.1, 0.1)), loss=1.0, lr=0.1, images_per_step=1, step=2)
        run.log_evaluation(top1=top1, top5=None, loss=1.0, epoch=1, step=2)
        run.finish_summary()
    return run


def everything(uri: str) -> dict[str, Any]:
    store = open_store(uri, create=False)
    return {
        run.info.run_id: run for run in store.search_runs([store.get_experiment_by_name("ssam_scale").experiment_id])
    }


def test_one_seed_has_no_parent(config: MakeConfig, uri: str) -> None:
    finished(config("depth"), 80.0)
    finished(config("depth"), 80.0)
    finished(config("sam", seed=1), 80.0)  # of another configuration
    assert not [run for run in everything(uri).values() if KIND in run.data.tags]


def test_the_second_seed_brings_a_parent_with_the_mean(config: MakeConfig, uri: str) -> None:
    runs = [finished(config("depth", seed=seed, group=f"job {seed}"), top1) for seed, top1 in ((0, 80.0), (1, 82.0))]
    found = everything(uri)
    (parent,) = [run for run in found.values() if run.data.tags.get(KIND) == PARENT]
    for run in runs:
        assert found[run.id].data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert parent.info.status == "FINISHED"
    assert parent.info.run_name == "ssam-depth resnet18"
    assert parent.data.tags["mask"] == "depth rotate 0.25–0.75"
    assert parent.data.metrics == {
        "seeds": 2.0,
        "summary/top1": 81.0,
        "summary/top1_sd": pytest.approx(2**0.5),
        "summary/step_time": pytest.approx(0.1),
        "summary/step_time_sd": pytest.approx(0.0, abs=1e-12),
    }
    finished(config("depth", seed=1), 84.0)  # once more: the latest of a seed counts
    parent = everything(uri)[parent.info.run_id]
    assert (parent.data.metrics["seeds"], parent.data.metrics["summary/top1"]) == (2.0, 82.0)


def test_of_two_parents_made_at_once_the_older_stays(config: MakeConfig, uri: str) -> None:
    runs = [finished(config("depth", seed=seed), 80.0) for seed in (0, 1)]
    store = open_store(uri, create=False)
    (parent,) = [run for run in everything(uri).values() if run.data.tags.get(KIND) == PARENT]
    key, experiment = parent.data.tags[CONFIGURATION], parent.info.experiment_id
    younger = store.create_run(experiment, tags={KIND: PARENT, CONFIGURATION: key}).info.run_id
    store.set_tag(runs[0].id, "mlflow.parentRunId", younger)
    adopt(store, experiment, key, "any")
    assert everything(uri)[runs[0].id].data.tags["mlflow.parentRunId"] == parent.info.run_id

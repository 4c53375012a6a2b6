"""A parent for runs that differ in their seed alone, which MLflow's table shows as one row that opens into them."""

from __future__ import annotations

from statistics import fmean, stdev
from typing import Any

from ssam_scale.tracking.identity import CONFIGURATION, KIND

PARENT = "seeds"
"""`KIND` of a parent."""

_PARENT_TAG = "mlflow.parentRunId"
_SHARED = "method", "mask", "plan", "backend", "hardware"
_MEANS = (
    "summary/top1",
    "summary/step_time",
    "summary/density",
    "saving/vs_dense_percent",
    "overhead/vs_base_percent",
)


def adopt(client: Any, experiment_id: str, key: str, name: str) -> None:
    """Put the runs of one configuration under a parent, as soon as there are two seeds of it.

    Called by each run after it is made, so that of two at the same time at least one sees both; of two parents that are
    made at the same time the older one stays.

    Args:
        client: of the store, `mlflow.MlflowClient`.
        experiment_id: of the runs.
        key: their tag `CONFIGURATION`.
        name: of the parent.
    """
    children, parents = _family(client, experiment_id, key)
    if len({run.data.tags.get("seed") for run in children}) < 2:
        return
    if not parents:
        tags = {CONFIGURATION: key, KIND: PARENT}
        tags |= {key: value for key, value in children[0].data.tags.items() if key in _SHARED}
        made = client.create_run(experiment_id, tags=tags, run_name=name)
        client.set_terminated(made.info.run_id)
        children, parents = _family(client, experiment_id, key)
        for younger in parents[1:]:
            if younger.info.run_id == made.info.run_id:
                client.delete_run(made.info.run_id)
    for run in children:
        if run.data.tags.get(_PARENT_TAG) != parents[0].info.run_id:
            client.set_tag(run.info.run_id, _PARENT_TAG, parents[0].info.run_id)


def sum_up(client: Any, experiment_id: str, key: str) -> None:
    """Record mean and standard deviation over the seeds that have finished in their parent, if they have one.

    Args:
        client: of the store, `mlflow.MlflowClient`.
        experiment_id: of the runs.
        key: their tag `CONFIGURATION`.
    """
    children, parents = _family(client, experiment_id, key)
    if not parents:
        return
    latest = {run.data.tags.get("seed"): run for run in children if "summary/step_time" in run.data.metrics}
    parent = parents[0].info.run_id
    client.log_metric(parent, "seeds", len(latest))
    for name in _MEANS:
        found = [run.data.metrics[name] for run in latest.values() if name in run.data.metrics]
        if found:
            client.log_metric(parent, name, fmean(found))
        if len(found) > 1:
            client.log_metric(parent, f"{name}_sd", stdev(found))


def _family(client: Any, experiment_id: str, key: str) -> tuple[list[Any], list[Any]]:
    """Runs of a configuration, and their parents, both the oldest first."""
    found: list[Any] = []
    token = None
    while True:
        page = client.search_runs([experiment_id], f"tags.{CONFIGURATION} = '{key}'", page_token=token)
        found += page
        if not (token := page.token):
            break
    found.sort(key=lambda run: (run.info.start_time, run.info.run_id))
    return [r for r in found if KIND not in r.data.tags], [r for r in found if r.data.tags.get(KIND) == PARENT]

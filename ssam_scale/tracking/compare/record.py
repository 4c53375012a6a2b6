"""The report in MLflow: one run for what was compared, whose artifacts are those of the latest time."""

from __future__ import annotations

import logging

from ssam_scale.tracking.commands import interface_lines
from ssam_scale.tracking.compare.files import as_csv, as_json
from ssam_scale.tracking.compare.rows import Comparison
from ssam_scale.tracking.identity import KIND
from ssam_scale.tracking.store import one_line

_log = logging.getLogger(__name__)

PAGE, TABLE, ROWS = "comparison.html", "comparison.csv", "comparison.json"  # artifacts

_ALL = "all runs"
_REPORT, _OF = "report", "comparison"  # its kind; and the tag that says what was compared


def record(comparison: Comparison, page: str) -> list[str]:
    """Keep a comparison as artifacts of a run of its own, which no comparison takes for a training.

    There is one such run for all runs of an experiment and one for each group; it is used again. What fails is a
    warning: the page is written.

    Args:
        comparison: which.
        page: its page.

    Returns:
        Lines that say where it is; none if it could not be stored.
    """
    experiment, group = comparison.experiment, comparison.question.group
    what = _ALL if group is None else f"group {group}"
    try:
        run_id = _run(comparison, what)
        client = experiment.client
        client.log_text(run_id, page, PAGE)
        client.log_text(run_id, as_csv(comparison.rows), TABLE)
        client.log_text(run_id, as_json(comparison.rows), ROWS)
        client.set_tag(run_id, "mlflow.note.content", f"Comparison of {what}: open the artifact `{PAGE}`.")
        client.set_terminated(run_id, "FINISHED")
    except Exception as error:  # MLflow lets its stores' errors through, of every kind
        _log.warning("MLflow did not keep the comparison (--no-log does not ask it to): %s", one_line(error))
        return []
    address = interface_lines(experiment.uri, experiment.id, run_id)[-1].partition(": ")[2].strip()
    return [f"MLflow keeps it: {address}/artifacts/{PAGE}"]


def _run(comparison: Comparison, what: str) -> str:
    """Id of the run that keeps comparisons of this, made if there is none."""
    experiment = comparison.experiment
    # Not asked for by what it compares, which may hold any sign.
    found = experiment.client.search_runs([experiment.id], f"tags.{KIND} = '{_REPORT}'")
    for run in found:
        if run.data.tags.get(_OF) == what:
            return str(run.info.run_id)
    tags = {KIND: _REPORT, _OF: what, "mlflow.source.name": "ssam-scale compare", "mlflow.source.type": "LOCAL"}
    name = f"comparison of {what}"
    return str(experiment.client.create_run(experiment.id, tags=tags, run_name=name).info.run_id)

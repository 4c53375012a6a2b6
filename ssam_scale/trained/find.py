"""Which checkpoint is meant: one that is named, the newest or best of a folder, or that of a tracked run."""

from __future__ import annotations

import os
from pathlib import Path

from ssam_scale.errors import UserError
from ssam_scale.tracking.find import find_run
from ssam_scale.train.checkpoint import checkpoints
from ssam_scale.train.checkpoint.files import STATE, read_state
from ssam_scale.train.checkpoint.folder import best as best_of

METRICS = ("top1", "top5", "loss")
"""Of an evaluation, by which a checkpoint may be the best."""


def check_metric(metric: str | None) -> None:
    """Refuse what no evaluation has.

    Raises:
        UserError: it has not; says what there is.
    """
    if metric is not None and metric not in METRICS:
        raise UserError(f"--best {metric}: an evaluation has {', '.join(METRICS)}")


def find_checkpoint(wanted: str, *, best: str | None, tracking_uri: str, experiment: str) -> Path:
    """The folder of the checkpoint that is meant.

    Args:
        wanted: a checkpoint, a folder of checkpoints, or a tracked run's id or name.
        best: of several, that with the best evaluation by one of `METRICS`; None: the newest.
        tracking_uri: the store that a run is looked for in.
        experiment: of that store.

    Raises:
        UserError: there is none; says what would be.
    """
    check_metric(best)
    path = Path(wanted)
    if (path / STATE).is_file():
        if best is not None:
            raise UserError(f"--best {best}: {path} is one checkpoint; name the folder that it is in, or a run")
        return path
    if path.is_dir():
        return _chosen(checkpoints(path), best, f"{path}: is not a checkpoint, which has a {STATE}, and has none in it")
    if path.exists():
        raise UserError(f"{path}: is a file; give a checkpoint's folder, or, of a file of weights, --config FILE too")
    if os.sep in wanted or wanted.startswith("."):
        there = f"; there is {found[-1]}" if (found := checkpoints(path.parent)) else ""
        raise UserError(f"{path}: no such checkpoint{there}")
    try:
        run = find_run(tracking_uri, experiment, wanted)
    except UserError as error:
        raise UserError(f"{wanted}: no such checkpoint here, and no run: {error}") from error
    if (directory := run.params.get("checkpoint.directory")) is None:
        raise UserError(f"run {wanted}: was not made by `ssam-scale train`, and has no checkpoint.directory")
    of_run = [path for path in checkpoints(Path(directory)) if _run_of(path) == run.id]
    hint = "" if Path(directory).is_absolute() else " (relative to where it was started)"
    return _chosen(of_run, best, f"run {wanted}: {directory}{hint} has no checkpoint of it on this machine")


def _chosen(found: list[Path], best: str | None, otherwise: str) -> Path:
    if not found:
        raise UserError(otherwise)
    if best is None:
        return found[-1]
    if (chosen := best_of(found, best)) is None:
        raise UserError(f"--best {best}: none of the {len(found)} checkpoints in {found[0].parent} has it")
    return chosen


def _run_of(path: Path) -> str | None:
    try:
        found = read_state(path)["parts"]["progress"]["run_id"]
        return None if found is None else str(found)
    except (ValueError, KeyError, TypeError):
        return None

"""Artifacts of a store whose folder was moved or copied: MLflow records their absolute place, by experiment and run.

An experiment of an SQLite database keeps its artifacts beside the database (`store.experiment_id`), so that their new
place is known, and is recorded instead. Where it is not known, nothing is written at the old one without a word.
"""

from __future__ import annotations

import logging
import shlex
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from ssam_scale.errors import UserError
from ssam_scale.tracking.redaction import without_secrets

_log = logging.getLogger(__name__)

BESIDE = "mlartifacts"
"""The folder beside an SQLite database in which its artifacts lie, a folder for each experiment."""


def follow_moved(experiment: Any, uri: str, database: Path | None) -> None:
    """See to it that the artifacts of an experiment lie where they are recorded.

    Args:
        experiment: MLflow's, which is going to be written to or read.
        uri: of its store.
        database: the store's file, if it is one.

    Raises:
        UserError: they are recorded in a folder of which nothing is here.
    """
    old = str(experiment.artifact_location)
    recorded = _local(old)
    if recorded is None:
        return  # a server's, or a bucket's
    if database is not None:
        beside = database.resolve().parent / recorded.parent.name / recorded.name
        if recorded == beside or (recorded.exists() and beside.exists() and recorded.samefile(beside)):
            return
        ours = recorded.parent.name == BESIDE
        # A copied project finds files in both places, and writes to its own.
        moved = (ours or beside.exists()) and not recorded.exists()
        if moved or (ours and beside.exists()):
            _record(database, str(experiment.experiment_id), old, beside)
            return
        if ours:
            _log.warning("artifacts go to %s, where %s records them, and not beside it", recorded, database)
    # MLflow makes the last two of its folders when the first artifact comes.
    if not recorded.exists() and not recorded.parent.parent.exists():
        raise UserError(
            f"tracking.experiment {experiment.name!r} in {without_secrets(uri)} keeps its artifacts in {recorded}, "
            "of which nothing is here; choose another name, or if that is the place: "
            f"mkdir -p {shlex.quote(str(recorded))}"
        )


def _local(location: str) -> Path | None:
    """The folder that a location names, if it is one of this machine's."""
    parts = urlsplit(location)
    return Path(unquote(parts.path)) if parts.scheme in ("", "file") else None


def _record(database: Path, experiment_id: str, old: str, new: Path) -> None:
    """Put the new place of an experiment's artifacts in that of the old one, for all of its runs. MLflow cannot."""
    try:
        with closing(sqlite3.connect(database, timeout=5.0)) as connection, connection:
            connection.execute(
                "UPDATE experiments SET artifact_location = ? WHERE experiment_id = ?", (str(new), int(experiment_id))
            )
            connection.execute(
                "UPDATE runs SET artifact_uri = ? || substr(artifact_uri, ?) "
                "WHERE experiment_id = ? AND substr(artifact_uri, 1, ?) = ?",
                (str(new), len(old) + 1, int(experiment_id), len(old) + 1, f"{old}/"),
            )
    except sqlite3.Error as error:
        raise UserError(
            f"{database}: its artifacts are recorded in {old}, from where they were moved to {new}, and the new place "
            f"cannot be recorded: {error}"
        ) from error
    _log.warning("%s was moved: artifacts are recorded in %s from now on, no longer in %s", database, new, old)

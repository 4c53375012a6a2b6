"""A job that a launcher starts again and again has to come further each time, or ends with the reason."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ssam_scale.config.schema import Config
from ssam_scale.errors import UserError
from ssam_scale.sharding import World

NAME = ".starts.json"
_BEGINNING = "the beginning"


@dataclass(frozen=True)
class Restarts:
    """Which start of which job this is.

    Attributes:
        job: what stays the same when it is started again; empty: nobody starts this process again.
        count: how often that has happened.
    """

    job: str = ""
    count: int = 0

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Restarts:
        """By what Slurm (`--requeue`) and torchrun (`--max-restarts`) say; both, of a job that has both."""
        counts = (environment.get(name, "") for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))
        elastic = environment.get("TORCHELASTIC_RUN_ID", "")
        names = environment.get("SLURM_JOB_ID", ""), "of torchrun" if elastic == "none" else elastic
        return cls("/".join(filter(None, names)), sum(int(count) for count in counts if count.isdigit()))


def note_start(config: Config, world: World, resumed: Path | None) -> None:
    """Note where a job goes on from, which nobody may have brought further in two starts. Collective.

    Only what is started again by itself is ended: whoever types the command anew knows why.

    Args:
        config: of the run.
        world: the processes.
        resumed: the checkpoint that it goes on from; None: there is none.

    Raises:
        UserError: the last two starts of this job began where this one does; says what to look at.
    """
    problem = _noted(config, Restarts.of(os.environ), resumed) if world.first else ""
    if problem := world.first_says(problem):
        raise UserError(problem)


def _noted(config: Config, restarts: Restarts, resumed: Path | None) -> str:
    file, place = config.checkpoint.directory / NAME, resumed.name if resumed is not None else _BEGINNING
    before = _read(file, restarts.job) if restarts.count else []
    if before[-2:] == [place, place]:
        return (
            f"job {restarts.job} is at {place} at its start number {restarts.count + 1}, as it was at the two before: "
            "they have saved nothing. Look at what ended them; if it was the time limit, give more, or a smaller "
            "checkpoint.every_minutes or every_steps"
        )
    if restarts.job:
        file.write_text(json.dumps({"job": restarts.job, "places": [*before[-1:], place]}))
    return ""


def _read(file: Path, job: str) -> list[str]:
    """Where the last starts of a job began."""
    try:
        found = json.loads(file.read_text())
        return list(map(str, found["places"])) if found["job"] == job else []
    except (OSError, ValueError, KeyError, TypeError):
        return []

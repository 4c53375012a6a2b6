"""The checkpoints of a run in its folder: how they are called, which is the newest, which are kept."""

from __future__ import annotations

import itertools
import re
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from ssam_scale.config.schema import Checkpoint, Config
from ssam_scale.errors import UserError
from ssam_scale.sharding import World
from ssam_scale.train.progress import Progress

from .files import STATE, problem_with, read_state, remove

_NAME = re.compile(r"epoch_(\d+)(?:_step_(\d+))?")


class Place(NamedTuple):
    """Where in a run a checkpoint is of; rising.

    Attributes:
        epoch: epochs done.
        step: 0 at the end of an epoch; within one the optimizer steps done since the run began, whatever their size.
    """

    epoch: int
    step: int = 0

    @staticmethod
    def of(progress: Progress) -> Place:
        """Where a run is."""
        return Place(progress.epoch, progress.step if progress.seen else 0)

    def __str__(self) -> str:
        """The name of its checkpoint."""
        return f"epoch_{self.epoch:04d}" + (f"_step_{self.step:06d}" if self.step else "")


def place_of(path: Path) -> Place | None:
    """Where in its run a checkpoint is of, by its name."""
    found = _NAME.fullmatch(path.name)
    return Place(int(found[1]), int(found[2] or 0)) if found else None


def checkpoints(directory: Path) -> list[Path]:
    """Those in a folder, the earliest first."""
    found = [(place, path) for path in directory.glob("epoch_*") if (place := place_of(path)) is not None]
    return [path for _, path in sorted(found)]


def newest(directory: Path) -> Path | None:
    """The checkpoint in `directory` of the latest place."""
    found = checkpoints(directory)
    return found[-1] if found else None


def resolve(config: Config, world: World) -> tuple[Path | None, list[str]]:
    """The checkpoint that `checkpoint.resume` names, of which every byte is what was written. Collective.

    Returns:
        With `auto` the newest of which that holds; None for a fresh start. And lines on newer ones that are not used.

    Raises:
        UserError: the named checkpoint does not exist or is damaged; or of those in the folder all are.
    """
    wanted = config.checkpoint.resume
    if wanted is None:
        return None, []
    if wanted != "auto":
        path = Path(wanted)
        if not world.first_says((path / STATE).is_file()):
            inside = newest(path)
            hint = f"; did you mean {inside}?" if inside else f"; give a folder with a {STATE}, or auto"
            raise UserError(f"checkpoint.resume: {path} is not a checkpoint{hint}")
        if (problem := problem_with(path, world)) is not None:
            raise UserError(f"checkpoint {path} cannot be read: {problem}")
        if _is_average(path):
            raise UserError(
                f"checkpoint {path} is an average of weights, which no run goes on from; one that starts from them has "
                f"model.pretrained={path}"
            )
        return path, []
    problems: list[str] = []
    # As the first process sees them: on a shared file system others may see a folder some seconds late.
    for path in reversed(world.first_says(checkpoints(config.checkpoint.directory))):
        problem = problem_with(path, world)
        if problem is None and _is_average(path):
            problem = "it is an average of weights"
        if problem is None:
            return path, [f"{each}; {path} is used instead" for each in problems]
        problems.append(f"checkpoint {path} cannot be used: {problem}")
    if problems:
        others = f" (and none of {len(problems) - 1} older ones)" if len(problems) > 1 else ""
        raise UserError(f"{problems[0]}{others}; move it away to begin anew, or name another one with --resume")
    return None, []


def _is_average(path: Path) -> bool:
    """Whether a checkpoint has the mean of several ones' weights, and nothing else of a run."""
    return "average_of" in read_state(path)


def check_fresh_directory(config: Config) -> None:
    """A run that starts afresh must not share its folder with another one, whose checkpoints it would take for its own.

    Raises:
        UserError: the folder has checkpoints.
    """
    directory = config.checkpoint.directory
    if (other := newest(directory)) is not None:
        raise UserError(
            f"checkpoint.directory {directory} has {other.name} of an earlier run: go on from it with --resume auto, "
            "or choose another folder"
        )


def set_aside(directory: Path, resumed: Path) -> list[Path]:
    """Rename the checkpoints that a run which goes on from `resumed` leaves behind; returns them under their new names.

    Those are the later ones, of a branch that is abandoned or damaged; all, where `resumed` is in another folder. So
    what is newest is always of the run that goes on.
    """
    inside = resumed.parent.resolve() == directory.resolve()
    place, aside = place_of(resumed) if inside else None, []
    for path in checkpoints(directory):
        own = place_of(path)
        if place is None or (own is not None and own > place):
            names = (f"{path.name}.superseded{f'.{n}' if n else ''}" for n in itertools.count())
            target = next(path.with_name(name) for name in names if not path.with_name(name).exists())
            aside.append(path.rename(target))
    return aside


def drop_old(section: Checkpoint) -> None:
    """Delete the checkpoints that none of `keep`, `keep_every` and `keep_best` keeps."""
    every = checkpoints(section.directory)
    kept = {*every[-section.keep :], best(every, section.keep_best)}
    if section.keep_every is not None:
        kept |= {path for path in every if _is_multiple(path, section.keep_every)}
    for path in every:
        if path not in kept:
            with suppress(OSError):  # it is tried again after the next one
                remove(path)


def best(every: list[Path], metric: str | None) -> Path | None:
    """The checkpoint with the best evaluation, the latest of equals; None if there is none, or no metric."""
    if metric is None:
        return None
    found = [(value, path) for path in every if (value := _evaluated(path).get(metric)) is not None]
    sign = -1.0 if metric == "loss" else 1.0
    return max(found, key=lambda pair: (sign * pair[0], place_of(pair[1])), default=(0.0, None))[1]


def _evaluated(path: Path) -> dict[str, Any]:
    try:
        return dict(read_state(path)["evaluation"] or {})
    except (ValueError, KeyError, TypeError):
        return {}


def _is_multiple(path: Path, epochs: int) -> bool:
    place = place_of(path)
    return place is not None and not place.step and place.epoch > 0 and place.epoch % epochs == 0

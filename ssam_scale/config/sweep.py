"""What a sweep is: runs of one configuration, by method, by values of dotted keys, and by seed."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from ssam_scale.config.explain import OVERRIDE
from ssam_scale.config.knobs import Knobs, as_override, in_words, product
from ssam_scale.config.load import read_as, read_named, resolved
from ssam_scale.config.presets import PRESETS, TERMS
from ssam_scale.config.schema import Config
from ssam_scale.config.section import KeyPath, Section, UserPath
from ssam_scale.config.spelling import nearest
from ssam_scale.errors import UserError

AS_IT_IS, BASE = "config", "base"
"""Methods that are no preset: the configuration as it is, and without its perturbation."""

_MOST = 10_000  # runs
_CHARACTERS = 100  # of a folder's name
_OWN = ("train.seed", "checkpoint.directory", "checkpoint.resume", "tracking.group", "tracking.run_name")


class Range(Section):
    """Numbers between two."""

    low: int | float = Field(description="the least")
    high: int | float = Field(description="the largest; whole numbers are drawn where both are whole")
    log: bool = Field(False, description="evenly by their logarithms")

    @model_validator(mode="after")
    def _rising(self) -> Range:
        if not self.low < self.high:
            raise ValueError(f"low: {self.low:g} is not below high, {self.high:g}")
        if self.log and self.low <= 0.0:
            raise ValueError(f"low: {self.low:g} has no logarithm; it must be above 0")
        return self

    def draw(self, by: random.Random) -> int | float:
        """One of them."""
        whole = isinstance(self.low, int) and isinstance(self.high, int)
        if whole and not self.log:
            return by.randint(int(self.low), int(self.high))
        if self.log:
            value = math.exp(by.uniform(math.log(self.low), math.log(self.high)))
        else:
            value = by.uniform(self.low, self.high)
        return round(value) if whole else float(f"{value:.4g}")


class Random(Section):
    """Draws, the same ones for each method."""

    draws: int = Field(ge=1, le=_MOST, description="how many")
    seed: int = Field(0, ge=0, description="of the draws")
    values: dict[str, Range | list[Any]] = Field(
        min_length=1, description="by dotted key, a range (low, high, log) or the values that one is drawn from"
    )

    @field_validator("values")
    @classmethod
    def _some(cls, value: dict[str, Range | list[Any]]) -> dict[str, Range | list[Any]]:
        for key, given in value.items():
            if given == []:
                raise ValueError(f"{key} has no values")
        return value


class Sweep(Section):
    """Runs of one configuration: methods times points times seeds."""

    config: UserPath = Field(description="the file of a run's configuration, relative to this one")
    overrides: dict[str, Any] = Field(default_factory=dict, description="changes of it, by dotted key")
    methods: list[str] | dict[str, dict[str, Any] | None] = Field(
        default_factory=lambda: [AS_IT_IS],
        description=f"{AS_IT_IS} (as the file says), {BASE} (no perturbation), names that `ssam-scale methods` lists; "
        "or names of one's own with their changes of the configuration, by dotted key",
    )
    grid: dict[str, list[Any]] = Field(default_factory=dict, description="every combination of these values by key")
    points: list[dict[str, Any]] = Field(default_factory=list, description="or these values by key, one by one")
    random: Random | None = Field(None, description="or draws")
    seeds: list[Annotated[int, Field(ge=0, le=2**64 - 1)]] = Field(
        default_factory=lambda: [0], min_length=1, description="train.seed of each"
    )

    @field_validator("grid")
    @classmethod
    def _not_too_many(cls, value: dict[str, list[Any]]) -> dict[str, list[Any]]:
        if (number := math.prod(map(len, value.values()))) > _MOST:  # before they are made
            raise ValueError(f"{number:,} combinations; at most {_MOST:,}")
        return value

    @field_validator("overrides", "grid")
    @classmethod
    def _of_the_configuration(cls, value: dict[str, Any]) -> dict[str, Any]:
        for key, given in value.items():
            _refuse_own(key)
            if given == []:
                raise ValueError(f"{key} has no values")
        return value

    @field_validator("points")
    @classmethod
    def _each(cls, value: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for key in itertools.chain(*value):
            _refuse_own(key)
        return value

    @field_validator("methods")
    @classmethod
    def _names(cls, value: Any) -> Any:
        if not value:
            raise ValueError(f"there is none; {AS_IT_IS} is the configuration as it is")
        for name in value:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
                raise ValueError(f'"{name}" is not a name of letters, digits, ".", "_" and "-"')
            if list(value).count(name) > 1:
                raise ValueError(f"{name} is there twice")
            changes = value[name] if isinstance(value, dict) else None
            for key in changes or ():
                _refuse_own(key)
            if changes is None and name not in (AS_IT_IS, BASE, *PRESETS, *TERMS):
                near = nearest(name, [AS_IT_IS, BASE, *PRESETS, *TERMS])
                hint = f"did you mean {near}?" if near else "`ssam-scale methods` lists them"
                raise ValueError(f"there is no method {name}; {hint}")
        return value

    @field_validator("seeds")
    @classmethod
    def _once(cls, value: list[int]) -> list[int]:
        if len(set(value)) < len(value):
            raise ValueError(f"one is there twice in {value}")
        return value

    @model_validator(mode="after")
    def _one_way(self) -> Sweep:
        ways = [name for name in ("grid", "points", "random") if getattr(self, name)]
        if len(ways) > 1:
            raise ValueError(f"{' and '.join(ways)}: one of grid, points and random says what is tried")
        for key in self.random.values if self.random else ():
            _refuse_own(key)
        return self

    def changes(self, method: str) -> dict[str, Any]:
        """What a method changes, by dotted key."""
        own = self.methods[method] if isinstance(self.methods, dict) else None
        if own is not None:
            return own
        if method == AS_IT_IS:
            return {}
        if method in TERMS:
            return {"perturbation": None, "trajectory": dict(TERMS[method].point)}
        return {"perturbation": None if method == BASE else {"preset": method}}

    def tried(self) -> list[Knobs]:
        """The points that each method is trained at."""
        if self.random is not None:
            by = random.Random(self.random.seed)
            values = self.random.values.items()
            return [
                tuple((key, each.draw(by) if isinstance(each, Range) else by.choice(each)) for key, each in values)
                for _ in range(self.random.draws)
            ]
        return [tuple(point.items()) for point in self.points] or product(self.grid)


def _refuse_own(key: str) -> None:
    for own in _OWN:
        if key == own or own.startswith(f"{key}."):
            raise ValueError(f"{key}: a sweep sets {own} itself" + (", by seeds" if own == "train.seed" else ""))


@dataclass(frozen=True)
class SweepRun:
    """One run.

    Attributes:
        method: by its name in the sweep.
        knobs: the point that it is trained at.
        seed: of it.
        name: of its folder.
    """

    method: str
    knobs: Knobs
    seed: int
    name: str

    @property
    def title(self) -> str:
        """In words."""
        return " ".join([self.method, *([in_words(self.knobs)] if self.knobs else []), f"seed {self.seed}"])


class LoadedSweep:
    """A sweep, its runs, and the configuration of each.

    Args:
        path: its file.
        folder: that a folder of each run lies in; None: checkpoints/NAME.

    Attributes:
        name: the file's, without its suffix; the group of its runs.
        folder: see above.
        runs: for each seed all methods at all points, so that a sweep that is not done yet compares them already.

    Raises:
        UserError: something in the file, or what it makes of the configuration, cannot be.
    """

    def __init__(self, path: Path, folder: Path | None = None) -> None:
        self._sweep, _, self._origins = read_as(Sweep, path, "a sweep", "docs/training.md#many-runs")
        self.name = path.stem
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            raise UserError(f'{path}: a sweep has its file\'s name, which is of letters, digits, ".", "_" and "-"')
        self.folder = folder or Path("checkpoints", self.name)
        self._values, self._value_origins = read_named(self._sweep.config, path, self._origins["config",])
        self._resolved(self._changes(self._sweep.overrides, ("overrides",)))  # a mistake there is no method's
        self.runs = tuple(self._all())
        if len(self.runs) > _MOST:
            raise UserError(f"{path}: {len(self.runs):,} runs; at most {_MOST:,}")
        for run in self.runs:
            if run.seed == self._sweep.seeds[0]:  # seeds change nothing that could be wrong
                self.config(run)

    def config(self, run: SweepRun) -> Config:
        """The configuration of a run.

        Raises:
            UserError: there cannot be such a one.
        """
        changes = self._changes(self._sweep.overrides, ("overrides",))
        methods = self._sweep.methods
        place = methods.index(run.method) if isinstance(methods, list) else run.method
        changes += self._changes(self._sweep.changes(run.method), ("methods", place))
        below = "grid" if self._sweep.grid else "random" if self._sweep.random else "points"
        changes += self._changes(dict(run.knobs), (below, "values") if below == "random" else (below,))
        own = {
            "train.seed": run.seed,
            "checkpoint.directory": str(self.folder / run.name),
            "checkpoint.resume": "auto",
            "tracking.group": self.name,
            "tracking.run_name": run.title,
        }
        try:
            return self._resolved([*changes, *self._changes(own, ())])
        except UserError as error:
            raise UserError(f"{run.method}{': ' + in_words(run.knobs) if run.knobs else ''}: {error}") from None

    def _changes(self, given: Mapping[str, Any], where: KeyPath) -> list[tuple[str, Any, KeyPath]]:
        """Keys, their values, and where they stand in the sweep's file."""
        return [(key, value, (*where, key)) for key, value in given.items()]

    def _resolved(self, changes: Sequence[tuple[str, Any, KeyPath]]) -> Config:
        overrides = [as_override(key, value) for key, value, _ in changes]
        try:
            return resolved(copy.deepcopy(self._values), dict(self._value_origins), overrides)
        except UserError as error:
            said = re.sub(r"\n\s*", "; ", str(error))
            for override, (_, _, where) in zip(overrides, changes, strict=True):
                for end in ":,":  # a contradiction has two places
                    said = said.replace(f"{OVERRIDE}{override}{end}", f"{self._place(where)}{end}")
            raise UserError(said) from None

    def _place(self, where: KeyPath) -> str:
        while where not in self._origins:
            where = where[:-1]
        return self._origins[where]

    def _all(self) -> Iterator[SweepRun]:
        names: set[str] = set()
        points = {method: self._points(method) for method in self._sweep.methods}
        for seed in self._sweep.seeds:
            for method, tried in points.items():
                for knobs in tried:
                    yield SweepRun(method, knobs, seed, self._folder_of(method, knobs, seed, names))

    def _points(self, method: str) -> list[Knobs]:
        """What a method is tried at: one without a perturbation has no radius that could be tried."""
        off = [key for key, value in self._sweep.changes(method).items() if value is None]
        left = (
            tuple((key, value) for key, value in knobs if not any(key.startswith(f"{section}.") for section in off))
            for knobs in self._sweep.tried()
        )
        return list({json.dumps(knobs, default=str): knobs for knobs in left}.values())

    def _folder_of(self, method: str, knobs: Knobs, seed: int, names: set[str]) -> str:
        """A name that tells them apart, if need be by a hash of the values."""
        point = re.sub(r"[^\w.=+,-]+", "_", in_words(knobs).replace(" ", "-")) if knobs else ""
        name = "-".join(filter(None, (method, point, "seed", str(seed))))
        if name in names or len(name) > _CHARACTERS:
            digest = hashlib.sha256(json.dumps(knobs, default=str).encode()).hexdigest()[:8]
            name = f"{'-'.join(filter(None, (method, point)))[:_CHARACTERS]}-{digest}-seed-{seed}"
        names.add(name)
        return name

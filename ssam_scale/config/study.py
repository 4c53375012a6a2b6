"""What a study of accuracy is: one recipe, methods that are tuned and trained by it, and how often.

Read by `ssam-scale bench accuracy`. Nothing of it is computed here, so that a mistake shows in the first second.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from ssam_scale.config.knobs import Knobs, as_override, product
from ssam_scale.config.load import read_as, read_named, resolved
from ssam_scale.config.schema import Config
from ssam_scale.config.section import KeyPath, Section, UserPath
from ssam_scale.errors import UserError

BASE, SAM = "base", "sam"
"""The methods that all others are measured against: the base optimizer, and dense SAM."""

_MOST_KNOBS = 2
# All that dense SAM says; with anything else, less than everything is perturbed, or not in every step.
_HOW_FAR = {"rho", "rho_schedule", "rho_final", "norm", "calibrate_every", "savings"}
# What the study decides, the same for every method.
_OWN = (
    *(f"data.{key}" for key in ("train", "val", "subset", "batch_size", "eval_batch_size", "eval_resolution")),
    *("tracking", "checkpoint", "sharding", "train.seed", "train.epochs", "train.max_steps", "train.eval_epochs"),
)


class StudyData(Section):
    """Images: disjoint draws of the training images, and the validation images."""

    source: Literal["fashion-mnist", "folder"] = Field(
        description="fashion-mnist: Debian's package; folder: what --data names, with train/ and val/ (or test/) in "
        "it, each with one folder of images per class"
    )
    train: int = Field(ge=1, description="images that every run is trained on")
    tune: int = Field(ge=1, description="other training images, by which knobs are chosen")
    val: int | None = Field(None, ge=1, description="validation images, by which methods are compared; null: all")


class Rung(Section):
    """One round of a tuning."""

    seeds: int = Field(ge=1, description="runs of each candidate")
    epochs: int | None = Field(None, ge=1, description="of each run; null: as many as the study's runs have")


class Tuning(Section):
    """Successive halving, the same for each method that has knobs."""

    candidates: int = Field(ge=1, description="points that the grid of each method has")
    rungs: tuple[Rung, ...] = Field(
        min_length=1, description="rounds; the better half of the candidates goes on to the next one"
    )


class Seeds(Section):
    """How often what was chosen is trained."""

    each: int = Field(ge=2, description="runs of each method; 5 and more tell something")
    finalists: int = Field(ge=2, description="runs of the finalists, of base and of sam")
    count: int = Field(4, ge=0, description="finalists: the best methods whose step takes at most `within`")
    within: float = Field(1.2, ge=1.0, description="of the base optimizer's step, by probes")

    @model_validator(mode="after")
    def _more(self) -> Seeds:
        if self.finalists < self.each:
            raise ValueError(f"finalists: {self.finalists} are fewer than each, {self.each}")
        return self


class Method(Section):
    """One way of training."""

    set: dict[str, Any] = Field(
        default_factory=dict, description="changes of the recipe by dotted key, e.g. {perturbation: {rho: 0.1}}"
    )
    tune: dict[str, list[Any]] = Field(
        default_factory=dict, description=f"at most {_MOST_KNOBS} dotted keys, and the values that are tried of each"
    )

    @field_validator("set", "tune")
    @classmethod
    def _of_the_method(cls, value: dict[str, Any]) -> dict[str, Any]:
        for key, given in value.items():
            for own in _OWN:
                if key == own or key.startswith(f"{own}.") or own.startswith(f"{key}."):
                    raise ValueError(f"{key} is the study's, the same for every method")
            if isinstance(given, list) and not given:
                raise ValueError(f"{key} has no values")
        return value

    @field_validator("tune")
    @classmethod
    def _few(cls, value: dict[str, list[Any]]) -> dict[str, list[Any]]:
        if len(value) > _MOST_KNOBS:
            raise ValueError(f"{', '.join(value)}: at most {_MOST_KNOBS} knobs are tuned")
        return value

    @property
    def grid(self) -> list[Knobs]:
        """All candidates; one without knobs if nothing is tuned."""
        return product(self.tune)


class Study(Section):
    """One setting, its methods, and how much is spent on them."""

    title: str = Field(description="what is studied, in words")
    config: UserPath | None = Field(None, description="the recipe: a run's configuration, relative to this file")
    recipe: dict[str, Any] | None = Field(None, description="or its sections, in the place of config")
    overrides: dict[str, Any] = Field(default_factory=dict, description="changes of the recipe, by dotted key")
    data: StudyData
    tuning: Tuning
    seeds: Seeds
    methods: dict[str, Method] = Field(description="by name; base and sam are among them")

    @field_validator("methods")
    @classmethod
    def _references(cls, value: dict[str, Method]) -> dict[str, Method]:
        for name in (BASE, SAM):
            if name not in value:
                raise ValueError(f"needs {BASE} and {SAM}, which the others are measured against; {name} is missing")
        for name in value:
            if not re.fullmatch(r"[A-Za-z0-9][\w.+×⅛-]*", name):
                raise ValueError(f'"{name}" is not a name of letters, digits, dots and dashes')
        return value

    @model_validator(mode="after")
    def _same_budget(self) -> Study:
        if (self.config is None) == (self.recipe is None):
            raise ValueError("needs either config, the file of a run's configuration, or recipe, its sections")
        for name, method in self.methods.items():
            if method.tune and len(method.grid) != self.tuning.candidates:
                raise ValueError(
                    f"methods.{name}.tune: has {len(method.grid)} candidates, and tuning.candidates is "
                    f"{self.tuning.candidates}: every method is tuned by the same budget"
                )
        return self


class LoadedStudy:
    """A study, and the configuration of each of its runs.

    Args:
        path: its file.

    Attributes:
        name: the file's, without its suffix.
        study: what the file says.

    Raises:
        UserError: something in the file, or what it makes of the recipe, cannot be.
    """

    def __init__(self, path: Path) -> None:
        self.study, values, origins = read_as(Study, path, "a study", "benchmarks/studies/")
        self.name = path.stem
        self._path, self._origins = path, origins
        self._values, self._value_origins = self._recipe(values)
        recipe = self.config()  # a mistake in the recipe itself is no method's
        if recipe.train.epochs is None:
            raise UserError(
                f"{path}: the recipe's train.max_steps {recipe.train.max_steps}: a study's runs are counted in epochs; "
                "give train.epochs"
            )
        for epochs in {rung.epochs for rung in self.study.tuning.rungs} | {None}:
            self._check_methods(epochs)
        self._check_references()

    @property
    def epochs(self) -> int:
        """Of the study's runs."""
        epochs = self.config().train.epochs
        assert epochs is not None  # which the constructor says
        return epochs

    def config(self, method: str | None = None, knobs: Knobs = (), own: Mapping[str, Any] | None = None) -> Config:
        """The configuration of a run.

        Args:
            method: one of the study's; None: the recipe as it is.
            knobs: what is tuned of it.
            own: further dotted keys.

        Raises:
            UserError: there cannot be such a one; says of which method.
        """
        changes: list[tuple[str, Any]] = [
            ("data.train", "train.beton"),
            ("data.val", "val.beton"),
            ("data.subset", None),
            ("data.workers", 1),
            *self.study.overrides.items(),
        ]
        if method is not None:
            changes += self.study.methods[method].set.items()
        changes += knobs
        # Of the study, whatever the recipe says: one process, and runs whose tracking is the study's.
        changes += [("sharding", {"backend": "single"}), *(own or {}).items()]
        overrides = [as_override(key, value) for key, value in changes]
        try:
            return resolved(copy.deepcopy(self._values), dict(self._value_origins), overrides)
        except UserError as error:
            said = re.sub(r"\n\s*", "; ", str(error))
            if method is None:
                raise UserError(f"{self._path}: {said}") from None
            where = self._origins.get(("methods", method), str(self._path))
            raise UserError(f"{where}: methods.{method}: {said}") from None

    def given(self, method: str, knobs: Knobs) -> dict[str, Any]:
        """What a run of this method is made from, but for seed and epochs: runs of which it is the same are the same.

        Only what is given, not what the defaults are: a program that has got a further key trains as it did before.
        """
        found = self.config(method, knobs).model_dump(mode="json", exclude_unset=True)
        for section in ("tracking", "checkpoint", "sharding"):
            found.pop(section, None)
        for section, keys in (("data", ("train", "val", "workers")), ("train", ("epochs", "seed", "eval_epochs"))):
            found[section] = {key: value for key, value in found[section].items() if key not in keys}
        return {**found, "images": self.study.data.model_dump(mode="json")}

    def _recipe(self, values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[KeyPath, str]]:
        """The sections of the recipe, and where their keys were given."""
        if self.study.config is not None:
            return read_named(self.study.config, self._path, self._origins["config",])
        own = {key[1:]: origin for key, origin in self._origins.items() if key[:1] == ("recipe",)}
        return dict(values["recipe"]), own

    def _check_methods(self, epochs: int | None) -> None:
        """Every candidate of every method can be trained for so many epochs; None: as many as the study's runs have."""
        for name, method in self.study.methods.items():
            for knobs in method.grid:
                if epochs is None:
                    self.config(name, knobs)
                    continue
                try:
                    self.config(name, knobs, {"train.epochs": epochs})
                except UserError as error:
                    raise UserError(f"{error} (tuning.rungs has one of {epochs})") from None

    def _check_references(self) -> None:
        """`base` has no perturbation, and `sam` perturbs everything in every step.

        Raises:
            UserError: it is otherwise.
        """
        if self.config(BASE).perturbation is not None:
            where = self._origins["methods", BASE]
            raise UserError(f"{where}: methods.{BASE}: has a perturbation; set: {{perturbation: null}}")
        for knobs in self.study.methods[SAM].grid:
            section = self.config(SAM, knobs).perturbation
            said = {} if section is None else section.model_dump(exclude_unset=True, exclude_none=True)
            if section is None or said.keys() - _HOW_FAR:
                where = self._origins["methods", SAM]
                raise UserError(
                    f"{where}: methods.{SAM}: is not dense SAM, which every other method is measured against; "
                    "set: {perturbation: {rho: 0.1}}"
                )

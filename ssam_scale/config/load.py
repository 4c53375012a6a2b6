"""From a YAML file and dotted overrides to a `Config`, and back to text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from ssam_scale.config.deepspeed import stage_of
from ssam_scale.config.deepspeed_file import read_deepspeed
from ssam_scale.config.explain import DEEPSPEED, OVERRIDE, Origins, comments, describe
from ssam_scale.config.include import INCLUDE, read
from ssam_scale.config.presets import PRESETS, ContradictionError, expanded
from ssam_scale.config.schema import UNTRACKED, Config
from ssam_scale.config.section import KeyPath, Section
from ssam_scale.config.yaml_lines import parse, write
from ssam_scale.errors import UserError

_KEY = re.compile(r"[^\s.=]+(\.[^\s.=]+)*")


def load(path: Path, overrides: Sequence[str] = (), deepspeed: str | None = None) -> Config:
    """The configuration in a file and those it includes, changed by overrides such as `perturbation.rho=0.2`.

    An override's value is read by the same rules as in the file. An override below a section that is null or absent
    creates the section; later overrides win. Relative paths are left as they are: relative to the current folder.

    Args:
        path: the file.
        overrides: see above.
        deepspeed: a file of DeepSpeed's own (`read_deepspeed`), whose keys go below `sharding.deepspeed`, before
            overrides.

    Raises:
        UserError: something in the file or the overrides cannot be; the message names key, line and what would work.
    """
    return load_with_origins(path, overrides, deepspeed)[0]


def load_with_origins(
    path: Path, overrides: Sequence[str] = (), deepspeed: str | None = None
) -> tuple[Config, dict[KeyPath, str]]:
    """`load`, and where each key was given: `configs/a.yaml:3`, an override, or the preset that it is of."""
    values, origins = read(path, "a configuration", "configs/, such as configs/quickstart.yaml")
    return resolved(values, origins, overrides, deepspeed), origins


_Read = TypeVar("_Read", bound=Section)


def read_as(section: type[_Read], path: Path, what: str, like: str) -> tuple[_Read, dict[str, Any], dict[KeyPath, str]]:
    """`read`, and what the file says as a section of another kind than a run's configuration.

    Raises:
        UserError: as `read`; or something in the file cannot be.
    """
    values, origins = read(path, what, like)
    try:
        return section.model_validate_json(json.dumps(values), strict=True), values, origins
    except ValidationError as error:
        raise UserError("; ".join(describe(error, values, origins, section))) from None


def read_named(given: Path, beside: Path, where: str) -> tuple[dict[str, Any], dict[KeyPath, str]]:
    """`read` of the run's configuration that another file names by its key `config`, relative to itself.

    Args:
        given: what it says.
        beside: that file.
        where: in it.

    Raises:
        UserError: as `read`; says where it is named.
    """
    try:
        return read(given if given.is_absolute() else beside.parent / given, "a configuration", "configs/")
    except UserError as error:
        raise UserError(f"{where}: config: {error}") from None


def resolved(
    values: dict[str, Any],
    origins: dict[KeyPath, str],
    overrides: Sequence[str] = (),
    deepspeed: str | None = None,
) -> Config:
    """The configuration in sections that were read; both are changed in place.

    Args:
        values: the sections.
        origins: where each key was given; of the empty key, where all of them were.
        overrides: as of `load`.
        deepspeed: the same.

    Raises:
        UserError: as `load`.
    """
    if deepspeed is not None:
        _add_deepspeed(deepspeed, values, origins)
    _refuse_split(overrides)
    for override in overrides:
        _apply(override, values, origins)
    _choose_stage(values, origins)
    _expand_preset(values, origins)
    try:
        # As JSON because strictness is just right there: no "3" or true for 3, but lists for tuples and text for paths.
        config = Config.model_validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        mistakes = describe(error, values, origins)
    else:
        if deepspeed is not None and not config.sharding.backend.startswith("zero"):
            raise UserError(
                f"--deepspeed_config {deepspeed}: it has no stage of ZeRO; say zero_optimization.stage there, or "
                "sharding.backend=zero2"
            )
        return config
    if len(mistakes) == 1:
        raise UserError(mistakes[0])
    raise UserError("\n  ".join([f"{origins[()]}: {len(mistakes)} mistakes in the configuration", *mistakes]))


def _expand_preset(values: dict[str, Any], origins: dict[KeyPath, str]) -> None:
    """Put the settings of a named method in their places.

    Raises:
        UserError: another setting contradicts it.
    """
    section = values.get("perturbation")
    name = section.get("preset") if isinstance(section, dict) else None
    if not isinstance(section, dict) or not isinstance(name, str) or name not in PRESETS:  # the schema tells
        return
    try:
        values["perturbation"] = expanded(section)
        origins.update(_of_preset(values["perturbation"], origins, f"preset {name}"))
    except ContradictionError as error:
        given = (_nearest(key, origins) for key in (("perturbation", "preset"), error.path))
        where = dict.fromkeys(origins[key] for key in given)
        raise UserError(f"{', '.join(where)}: {error}") from error


def _nearest(path: KeyPath, origins: Origins) -> KeyPath:
    """The key itself, or the section around it that was given as a whole."""
    return next(path[:n] for n in range(len(path), -1, -1) if path[:n] in origins)


def _of_preset(section: dict[str, Any], origins: Origins, preset: str) -> dict[KeyPath, str]:
    """Where the keys of an expanded section were given that nobody gave."""
    found: dict[KeyPath, str] = {}

    def visit(section: dict[str, Any], path: KeyPath) -> None:
        for key, value in section.items():
            here = (*path, key)
            if here not in origins:
                found[here] = preset
            if isinstance(value, dict):
                visit(value, here)

    visit(section, ("perturbation",))
    return found


def dump(config: Config, shown: Callable[[Any], Any] = lambda values: values, origins: Origins | None = None) -> str:
    """YAML that `load` turns into the same configuration, every key with its meaning as a comment.

    Args:
        config: that is written.
        shown: what is written in the place of the plain values, such as without passwords.
        origins: where each key was given, which its comment says too.
    """
    return write(shown(config.model_dump(mode="json")), comments(config, origins or {}))


def _refuse_split(overrides: Sequence[str]) -> None:
    """Say what a shell has made of an override in brackets that was not quoted."""
    for index, override in enumerate(overrides):
        value = override.partition("=")[2].lstrip()
        for opening, closing in ("{}", "[]"):
            if not value.startswith(opening) or value.count(opening) <= value.count(closing):
                continue
            for last in range(index + 1, len(overrides) + 1):
                whole = " ".join(overrides[index:last])
                if whole.count(opening) == whole.count(closing) and not _is_whole(value):
                    raise UserError(f"override {override}: the shell has cut it at a space; quote it: '{whole}'")


def _is_whole(value: str) -> bool:
    """Whether it can be read, so that a bracket too many is one in quotes."""
    try:
        parse(value, "")
    except UserError:
        return False
    return True


def _add_deepspeed(given: str, values: dict[str, Any], origins: dict[KeyPath, str]) -> None:
    """Put the keys of a file of DeepSpeed's into `values`, in place."""
    sections, lines, where = read_deepspeed(given)
    sharding = values.get("sharding") or {}
    own = sharding.get("deepspeed") or {} if isinstance(sharding, dict) else {}
    if not isinstance(sharding, dict) or not isinstance(own, dict):
        return  # a mistake that is told as one
    values["sharding"] = {**sharding, "deepspeed": {**own, **sections}}
    origins[DEEPSPEED] = where
    for key in sections:
        for known in [known for known in origins if known[:3] == (*DEEPSPEED, key)]:
            del origins[known]
    origins.update({(*DEEPSPEED, *key): f"{where}:{line}" for key, line in lines.items()})


def _choose_stage(values: dict[str, Any], origins: dict[KeyPath, str]) -> None:
    """Where the backend is left open and DeepSpeed's configuration has a stage of ZeRO, that is the backend."""
    sharding = values.get("sharding")
    if not isinstance(sharding, dict) or sharding.get("backend", "auto") != "auto":
        return
    if (stage := stage_of(sharding.get("deepspeed"))) is not None:
        sharding["backend"] = f"zero{stage}"
        where = (*DEEPSPEED, "zero_optimization", "stage")
        origins["sharding", "backend"] = next(origins[where[:n]] for n in range(4, -1, -1) if where[:n] in origins)


def _apply(override: str, values: dict[str, Any], origins: dict[KeyPath, str]) -> None:
    """Set one key of `values` in place."""
    origin = f"{OVERRIDE}{override}"
    key, equals, given = override.partition("=")
    if not equals or not _KEY.fullmatch(key):
        raise UserError(f"{origin}: an override is written key=value, for example train.epochs=3")
    if key == INCLUDE:
        raise UserError(f"{origin}: files are included by files; give --config one that says {INCLUDE}: {given}")
    value, _ = parse(given, origin)
    if re.search(r"(^|\s)#", given) and "#" not in json.dumps(value):
        raise UserError(f"{origin}: # begins a comment in YAML; quote the value: '{key}=\"{given}\"'")
    if isinstance(value, (dict, list)) and given.lstrip()[:1] not in ("{", "["):
        raise UserError(f"{origin}: not one value; quote a text, or write a list [a, b] or a section {{key: value}}")
    path: KeyPath = tuple(key.split("."))
    section = values
    for depth, name in enumerate(path[:-1], start=1):
        if path[:depth] == ("tracking",) and section.get("tracking", {}) is None:
            section["tracking"] = dict(UNTRACKED)  # an override of something else turns no tracking on
        if section.get(str(name)) is None:
            section[str(name)] = {}
            origins[path[:depth]] = origin
        section = section[str(name)]
        if not isinstance(section, dict):
            parent = ".".join(map(str, path[:depth]))
            raise UserError(f"{origin}: {parent} is a value ({json.dumps(section)}), not a section with keys")
    section[str(path[-1])] = value
    for known in [known for known in origins if known[: len(path)] == path]:
        del origins[known]
    origins[path] = origin

"""What every part of a configuration is."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

KeyPath = tuple[str | int, ...]
"""Where a value stands: ("data", "mean", 0)."""

TAGS = ("pattern", "source", "kind", "policy")
"""The keys by which the sections of a union are told apart."""

Share = Annotated[float, Field(ge=0.0, le=1.0)]


def regular_expression(value: str) -> str:
    """The text itself, where it is one.

    Raises:
        ValueError: it is none.
    """
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f'"{value}" is not a regular expression: {error}') from error
    return value


def home(path: Path) -> Path:
    """A path with the home folder in the place of a leading `~`, and environment variables in that of their names.

    Raises:
        ValueError: it names a variable that is not set.
    """
    path = Path(_with_variables(str(path)))
    with suppress(RuntimeError):  # no such user: the folder is meant
        return path.expanduser()
    return path


def home_in_uri(uri: str) -> str:
    """A tracking URI in whose path `~` and `$NAME` are what `home` makes of them, if it is of this machine's disk.

    Others are left as they are: a password may hold such signs.

    Raises:
        ValueError: it names a variable that is not set.
    """
    parts = re.fullmatch(r"(sqlite(?:\+\w+)?:///|file:(?://)?|(?![A-Za-z][\w+.-]*:))(/?)(.*)", uri, re.S)
    if parts is None or not re.search(r"\$|^~", parts[3]):
        return uri
    scheme, slash, rest = parts.groups()
    path = os.path.expanduser(_with_variables(rest))  # noqa: PTH111  (a Path would make one slash of several)
    # A folder of the root has no such name: file:///~/x is of the home folder too.
    return f"{scheme}{path if path.startswith('/') else slash + path}"


def _with_variables(path: str) -> str:
    path = os.path.expandvars(path)
    if unset := re.search(r"\$\{?([A-Za-z_]\w*)", path):
        raise ValueError(f"the environment variable {unset[1]} is not set")
    return path


def _of_a_disk(path: Any) -> Any:
    if path == "":
        raise ValueError("is empty; a path is needed")
    if isinstance(path, str) and re.match(r"[a-z][a-z0-9+.-]*://", path):
        raise ValueError("is an address; a path is needed, of a copy on a disk of this machine")
    return path


UserPath = Annotated[Path, BeforeValidator(_of_a_disk), AfterValidator(home)]
"""A path in which `~` and `$NAME` are what a shell makes of them, where it sees them."""


SOURCES = ("folder", "wds")
"""What images may be read from that are in no .beton file, as it stands before a colon."""


def in_parts(place: Path) -> tuple[str, Path]:
    """One of `SOURCES`, or nothing; and the path behind it."""
    source, colon, path = str(place).partition(":")
    return (source, Path(path)) if colon and source in SOURCES else ("", place)


def home_of_images(place: Path) -> Path:
    """`home` of the path behind one of `SOURCES`, or of a path."""
    source, path = in_parts(place)
    return Path(f"{source}:{home(path)}") if source else home(place)


ImagesPath = Annotated[Path, BeforeValidator(_of_a_disk), AfterValidator(home_of_images)]
"""A .beton file, or one of `SOURCES`, a colon and a path; paths as a `UserPath` is."""


def without(given: dict[str, Any], own: dict[str, str]) -> dict[str, Any]:
    """Further arguments of a library's function, if all that have a key of their own are given there.

    Args:
        given: the arguments.
        own: by argument, where it belongs, or why it cannot be given.

    Raises:
        ValueError: one is among these.
    """
    for name in given:
        if name in own:
            raise ValueError(f"{name} does not belong here: {own[name]}")
    return given


class Section(BaseModel):
    """A part of a configuration: immutable, and unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

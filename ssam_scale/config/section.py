"""What every part of a configuration is."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

KeyPath = tuple[str | int, ...]
"""Where a value stands: ("data", "mean", 0)."""

Share = Annotated[float, Field(ge=0.0, le=1.0)]


def home(path: Path) -> Path:
    """A path with the home folder in the place of a leading `~`."""
    with suppress(RuntimeError):  # no such user: the folder is meant
        return path.expanduser()
    return path


UserPath = Annotated[Path, AfterValidator(home)]
"""A path in which a leading `~` is the home folder, which shells make of it only where a word begins with it."""


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

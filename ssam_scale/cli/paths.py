"""Paths on the command line, in which `~` and `$NAME` are what a shell makes of them, where it sees them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from ssam_scale.errors import UserError


def expanded(param: typer.CallbackParam, value: Any) -> Any:
    """The callback of every option and argument that is a path: no shell looks into quotes, or behind `--out=`."""
    from ssam_scale.config.section import home

    return _each(param, value, lambda given: given if given.exists() else home(given))


def expanded_images(param: typer.CallbackParam, value: Any) -> Any:
    """The callback of an argument that says where images are, as `data.train` does."""
    from ssam_scale.config.section import home_of_images

    return _each(param, value, lambda given: given if given.exists() else home_of_images(given))


def expanded_uri(param: typer.CallbackParam, value: Any) -> Any:
    """The callback of every option that is a tracking URI."""
    from ssam_scale.config.section import home_in_uri

    return _each(param, value, home_in_uri)


def expanded_text(param: typer.CallbackParam, value: Any) -> Any:
    """The callback of an option that may be a path, or of an argument of which each may be one."""
    if isinstance(value, (list, tuple)):
        return [expanded_text(param, item) for item in value]
    return value if value is None or not Path(value).parts else str(expanded(param, Path(value)))


def _each(param: typer.CallbackParam, value: Any, change: Callable[[Any], Any]) -> Any:
    """`value` or, of several, each of them, changed where there is anything to change."""
    if isinstance(value, (list, tuple)):
        return [_each(param, item, change) for item in value]
    if value is None or not ("~" in str(value) or "$" in str(value)):
        return value
    try:
        return change(value)
    except ValueError as error:
        name = param.opts[0] if param.param_type_name == "option" else (param.name or "").upper()
        raise UserError(f"{name} {value}: {error}") from None

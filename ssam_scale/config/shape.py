"""The schema seen from outside: which keys exist where, and what they mean."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from ssam_scale.config.schema import Config
from ssam_scale.config.text import Path

Sections = list[type[BaseModel]]


def sections_in(annotation: Any) -> Sections:
    """The sections that a field of this type may hold: none, one, or the alternatives of a union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for argument in typing.get_args(annotation) for section in sections_in(argument)]


def sections_at(sections: Sections, name: str | int) -> Sections:
    """The sections that may stand under `name` in any of `sections`."""
    fields = [section.model_fields[name] for section in sections if name in section.model_fields]
    return [below for field in fields for below in sections_in(field.annotation)]


def names(sections: Sections) -> list[str]:
    """Every key that any of `sections` has."""
    return list(dict.fromkeys(name for section in sections for name in section.model_fields))


def dotted_names(sections: Sections = [Config], prefix: str = "") -> Iterator[str]:  # noqa: B006  (never changed)
    """Every key below `sections`, dotted."""
    for name in names(sections):
        yield prefix + name
        yield from dotted_names(sections_at(sections, name), f"{prefix}{name}.")


def resolve(location: tuple[str | int, ...]) -> tuple[Path, Sections, Sections]:
    """What pydantic calls a location, as the user's key: without the tags that stand for a union's alternatives.

    Returns:
        The key's path, the sections that may stand there, and the sections that may stand around it.
    """
    path: Path = ()
    around: Sections = []
    here: Sections = [Config]
    tagged = False
    for item in location:
        if tagged:
            here = [section for section in here if item in _tags(section)] or here
            tagged = False
            continue
        path += (item,)
        around, here = here, sections_at(here, item)
        tagged = len(here) > 1
    return path, here, around


def _tags(section: type[BaseModel]) -> set[Any]:
    literals = (field.annotation for field in section.model_fields.values())
    return {section.__name__}.union(*(typing.get_args(x) for x in literals if typing.get_origin(x) is typing.Literal))


def comments(section: BaseModel, path: Path = ()) -> dict[Path, str]:
    """The meaning of every key below a section."""
    result: dict[Path, str] = {}
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            meaning = (type(value).__doc__ or "").partition("\n")[0].rstrip(".")
            result |= {(*path, name): meaning, **comments(value, (*path, name))}
        elif field.description:
            result[(*path, name)] = field.description
    return result

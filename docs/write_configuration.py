"""Write docs/configuration.md from the schema, so that the reference says what the program checks.

python docs/write_configuration.py
"""

from __future__ import annotations

import json
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from ssam_scale.config.schema import Config
from ssam_scale.config.section import Section

OUT = Path(__file__).with_name("configuration.md")
INTRODUCTION = """\
# Configuration reference

Written by `python docs/write_configuration.py` from `ssam_scale/config/schema.py`: change it there.

A run is one YAML file with these sections. Any key can be overridden on the command line by its dotted name, the value
in YAML: `ssam-scale train --config configs/vit_b.yaml perturbation.rho=0.3 'perturbation.mask={pattern: norm}'`.
Unknown keys, wrong types and combinations that cannot work are errors that name the file's line and the nearest valid
key. `--print-config` prints the resolved configuration, every key with its meaning and, in brackets, where it was
given. For which settings make which method, see [training](training.md#what-you-want-and-how).

`include: resnet50.yaml`, or a list of files, begins from others, each relative to the file that says so. Sections are
merged key by key: later files' keys replace earlier ones', and a file's own replace all that it includes. Lists are
values. A section that names another kind (`pattern`, `preset`, `source`, `kind`, `policy`) than it had begins anew, and
`null` takes one away: `perturbation: null` makes the base optimizer's run of any configuration. Relative paths of data
and outputs are, in every file, relative to the current folder.
"""
_SIMPLE = {int: "whole number", float: "number", bool: "true or false", str: "text", Path: "path", type(None): "null"}


def unwrapped(annotation: Any) -> tuple[Any, list[Any]]:
    """The type inside of Annotated, and what is said about it there."""
    if get_origin(annotation) is not Annotated:
        return annotation, []
    inner, *said = get_args(annotation)
    found: list[Any] = []
    for each in said:
        found += each.metadata if isinstance(each, FieldInfo) else [each]
    return inner, found


def members(annotation: Any) -> list[Any]:
    """The types of a union, or the one that it is."""
    inner, _ = unwrapped(annotation)
    if get_origin(inner) in (Union, types.UnionType):
        return [member for each in get_args(inner) for member in members(each)]
    return [annotation]


def sections_of(annotation: Any) -> list[type[Section]]:
    """The sections that a field may hold, one or a list of them."""
    inner = [unwrapped(member)[0] for member in members(item_of(annotation) or annotation)]
    return [each for each in inner if isinstance(each, type) and issubclass(each, Section)]


def item_of(annotation: Any) -> Any:
    """What a list is of; None of what is no list."""
    inner, _ = unwrapped(annotation)
    arguments = get_args(inner)
    return arguments[0] if get_origin(inner) is tuple and arguments[-1] is Ellipsis else None


def bounds(metadata: list[Any]) -> str:
    """`at least 1`, `from 0 to 1`, `above 0 and at most 1`; empty without any."""
    words = {annotated_types.Ge: "at least", annotated_types.Gt: "above", annotated_types.Le: "at most"}
    words[annotated_types.Lt] = "below"
    said = []
    for each in metadata:
        for kind, word in words.items():
            if isinstance(each, kind):
                said.append(f"{word} {_number(getattr(each, kind.__name__.lower()))}")
    low, high = (next((word for word in said if word.startswith(start)), "") for start in ("at least", "at most"))
    return f"from {low.split()[-1]} to {high.split()[-1]}" if low and high else " and ".join(said)


def _number(value: float) -> str:
    """In few digits, but not in fewer than it has."""
    short = f"{value:g}"
    return short if float(short) == value and abs(value) < 2**53 else str(value)


def type_of(annotation: Any, metadata: list[Any]) -> str:
    """A type in words."""
    inner, own = unwrapped(annotation)
    many = members(inner)
    if len(many) > 1:
        words = [type_of(each, [] if each is type(None) else metadata) for each in many]
        return ("; or " if any("," in word for word in words) else " or ").join(words)
    origin, arguments = get_origin(inner), get_args(inner)
    if origin is Literal:
        return " or ".join(f"`{choice}`" for choice in arguments)
    if (item := item_of(inner)) is not None:
        return f"list of {type_of(item, [])}"
    if origin is tuple:
        return f"list of {len(arguments)}: {type_of(arguments[0], [])}"
    if origin is dict or inner is dict:
        return "section"
    return ", ".join(filter(None, (_SIMPLE[inner], bounds([*own, *metadata])))).replace(", from", " from")


def default_of(field: FieldInfo) -> str:
    """The default as YAML takes it; **needed** without one."""
    if field.is_required():
        return "**needed**"
    value = field.default
    if value is PydanticUndefined:
        assert field.default_factory is not None
        takes = field.default_factory_takes_validated_data
        value = field.default_factory({}) if takes else field.default_factory()  # type: ignore[call-arg]
    if isinstance(value, tuple):
        return f"`[{', '.join(f'{each:.4g}' if isinstance(each, float) else str(each) for each in value)}]`"
    return f"`{value if isinstance(value, (str, Path)) else json.dumps(value)}`"


def table(section: type[Section]) -> Iterator[str]:
    """The keys of one section that are no sections themselves."""
    yield "| key | type | default | meaning |"
    yield "|---|---|---|---|"
    for name, field in section.model_fields.items():
        if not sections_of(field.annotation):
            cells = (f"`{name}`", type_of(field.annotation, field.metadata), default_of(field), field.description or "")
            yield "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"
    yield ""


def write_sections(section: type[Section], path: str) -> Iterator[str]:
    """Each section below this one: its meaning, its keys, the sections in it."""
    for name, field in section.model_fields.items():
        here = f"{path}.{name}" if path else name
        inside = sections_of(field.annotation)
        level = "#" * (2 + here.count("."))
        if len(inside) > 1:  # told apart by a key
            yield from (f"{level} `{here}`", "", f"{capitalised(field.description)}.", "")
        for one in inside:
            title = f"`{here}`{', a list of' if item_of(field.annotation) else ''}"
            if len(inside) > 1:
                tag = next(key for key in ("pattern", "source", "kind", "policy") if key in one.model_fields)
                title = f"{tag} {' or '.join(get_args(one.model_fields[tag].annotation))}"
            note = f" {capitalised(field.description)}." if field.description and len(inside) == 1 else ""
            yield from (f"{level}{'#' * (len(inside) > 1)} {title}", "")
            yield from ((one.__doc__ or "").partition("\n")[0] + note, "")
            yield from table(one)
            yield from write_sections(one, here)


def capitalised(text: str | None) -> str:
    """A description as a sentence begins."""
    return text[:1].upper() + text[1:] if text else ""


def reference() -> str:
    """The whole page."""
    return "\n".join([INTRODUCTION, *write_sections(Config, "")]).rstrip() + "\n"


if __name__ == "__main__":
    OUT.write_text(reference(), encoding="utf-8")

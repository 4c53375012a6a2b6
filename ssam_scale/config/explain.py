"""A configuration's keys in the user's words: what each means, and pydantic's errors as one line each.

A line names the key, where it was given, what is expected there, and the nearest valid name.
"""

from __future__ import annotations

import json
import re
import typing
from collections.abc import Iterator, Mapping
from types import MappingProxyType, UnionType
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from ssam_scale.config.presets import PRESETS, TERMS
from ssam_scale.config.schema import Config
from ssam_scale.config.section import TAGS, KeyPath
from ssam_scale.config.spelling import nearest

Sections = list[type[BaseModel]]

OVERRIDE = "override "
"""What the place of a key that an override has given begins with."""

DEEPSPEED: KeyPath = ("sharding", "deepspeed")

Origins = Mapping[KeyPath, str]
"""Where each key was given: `configs/a.yaml:3` or `override train.epochs=3`."""


def describe(
    error: ValidationError, values: dict[str, Any], origins: Origins, root: type[BaseModel] = Config
) -> list[str]:
    """One line for each mistake of a configuration.

    Args:
        error: what pydantic found.
        values: what was given.
        origins: where each key was given.
        root: of what kind the whole is.
    """
    lines: list[str] = []
    meant: set[KeyPath] = set()  # keys that are missing only because they are misspelt
    for detail in sorted(
        _of_one_kind(error.errors(include_url=False), root), key=lambda each: each["type"] == "missing"
    ):
        path, here, around = resolve(detail["loc"], root)
        match detail["type"]:
            case "extra_forbidden":
                lines.append(_unknown(path, around, values, origins, meant, root))
            case "union_tag_not_found":
                lines += _untagged(path, here, detail, values, origins, meant, root)
            case "missing" if path in meant:
                pass
            case "default_factory_not_called":  # only because of another mistake
                pass
            case "missing" if isinstance(path[-1], int):
                lines.append(f"{_origin(path, origins)}: {_dotted(path[:-1])}: item number {path[-1] + 1} is missing")
            case "missing":
                lines.append(f"{_origin(path, origins)}: {_dotted(path)} is missing")
            case "deepspeed":
                lines.append(_of_deepspeed(path, detail["ctx"]["text"], origins))
            case "union_tag_invalid":
                lines.append(_invalid_tag(path, detail, origins))
            case _:
                lines.append(_wrong(path, here, detail, origins))
    return lines


def _of_one_kind(details: list[ErrorDetails], root: type[BaseModel]) -> list[ErrorDetails]:
    """Of what may be of several kinds (a whole number or auto) one error, where pydantic has one for each kind.

    It is the one that got furthest: that of a value further inside, or of a rule of ours; else all kinds in one.
    """
    by_key: dict[tuple[str | int, ...], list[ErrorDetails]] = {}
    for detail in details:
        where = detail["loc"]
        place = next((n for n in range(1, len(where)) if _is_label(where[:n], root)), len(where))
        by_key.setdefault(where[:place], []).append(detail)
    found: list[ErrorDetails] = []
    for where, alternatives in by_key.items():
        if len(alternatives) == 1 or all(each["loc"] == where for each in alternatives):
            found += alternatives
            continue
        furthest = max(alternatives, key=lambda each: (len(each["loc"]), each["type"] == "value_error"))
        inside = furthest["loc"][len(where) + 1 :]
        if inside or furthest["type"] == "value_error":
            found.append({**furthest, "loc": (*where, *inside)})
            continue
        kinds = dict.fromkeys(_should_be(each) for each in alternatives)
        found.append({**furthest, "type": "of_no_kind", "loc": where, "msg": f"Input should {' or '.join(kinds)}"})
    return found


def _should_be(detail: ErrorDetails) -> str:
    """What pydantic says that it should be."""
    return re.sub(r"^.*? should ", "", detail["msg"]).replace("'", "")


def _is_label(location: tuple[str | int, ...], root: type[BaseModel]) -> bool:
    """Whether what pydantic puts behind this location is its name for one of the kinds that may be there."""
    path, _, around = resolve(location, root)
    fields = [section.model_fields[str(path[-1])] for section in around if str(path[-1]) in section.model_fields]
    return len(fields) == 1 and len(_kinds(fields[0].annotation)) > 1 and not sections_in(fields[0].annotation)


def _kinds(annotation: Any) -> list[Any]:
    """The types of a union, but for null; else the one that it is."""
    if typing.get_origin(annotation) is typing.Annotated:
        return _kinds(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, UnionType):
        return [kind for each in typing.get_args(annotation) if each is not type(None) for kind in _kinds(each)]
    return [annotation]


def _unknown(
    path: KeyPath,
    around: Sections,
    values: dict[str, Any],
    origins: Origins,
    meant: set[KeyPath],
    root: type[BaseModel],
) -> str:
    name = str(path[-1])
    line = f"{_origin(path, origins)}: {_dotted(path)}: unknown key"
    section = _at(values, path[:-1])
    near = nearest(name, names(around))
    if path in _MOVED:
        return f"{line}; it is {_MOVED[path]}"
    if near:
        meant.add((*path[:-1], near))
        return f"{line}; did you mean {_dotted((*path[:-1], near))}?"
    elsewhere = [key for key in dotted_names([root]) if key.rpartition(".")[2] == name]
    siblings = [key for key in elsewhere if key.rpartition(".")[0] == _dotted(path[:-1])]
    for tag in TAGS:
        if siblings and len(around) == 1 and tag in around[0].model_fields:
            kind = section.get(tag, typing.get_args(around[0].model_fields[tag].annotation)[0])
            return f"{line} for {tag} {_shown(kind)}, which has {', '.join(names(around))}"
    if elsewhere:
        return f"{line}; did you mean {' or '.join(elsewhere)}?"
    return f"{line}; {_dotted(path[:-1]) or 'the configuration'} has {', '.join(names(around))}"


_MOVED: dict[KeyPath, str] = {
    **{("perturbation", name): f"perturbation.direction.{name}" for name in ("fraction", "scope", "choose")},
    ("perturbation", "savings", "within_shard_group"): "perturbation.direction.scope=shard_group",
}


def _untagged(
    path: KeyPath,
    here: Sections,
    detail: ErrorDetails,
    values: dict[str, Any],
    origins: Origins,
    meant: set[KeyPath],
    root: type[BaseModel],
) -> list[str]:
    """A union whose alternatives are told apart by a key that is not there: perhaps because it is misspelt."""
    discriminator = str((detail.get("ctx") or {}).get("discriminator", "'pattern'")).strip("'")
    strangers = [key for key in _at(values, path) if key not in names(here)]
    lines = [_unknown((*path, key), here, values, origins, meant, root) for key in strangers]
    if (*path, discriminator) not in meant:
        literals = [section.model_fields[discriminator].annotation for section in here]
        choices = [str(choice) for literal in literals for choice in getattr(literal, "__args__", ())]
        key = _dotted((*path, discriminator))
        lines.append(f"{_origin(path, origins)}: {key} is missing; it is {_alternatives(choices)}")
    return lines


def _invalid_tag(path: KeyPath, detail: ErrorDetails, origins: Origins) -> str:
    context = detail["ctx"]
    path = (*path, str(context["discriminator"]).strip("'"))
    choices = re.findall(r"'([^']*)'", context["expected_tags"])
    return f"{_origin(path, origins)}: {_dotted(path)}: {_choice(context['tag'], choices)}"


def _wrong(path: KeyPath, here: Sections, detail: ErrorDetails, origins: Origins) -> str:
    given = detail["input"]
    match detail["type"]:
        case "literal_error" if path == ("perturbation", "preset") and str(given) in TERMS:
            problem = f"{given} is a loss term and no perturbation; write 'trajectory={{kind: {given}}}'"
        case "literal_error":
            problem = _choice(given, re.findall(r"'([^']*)'", detail["ctx"]["expected"]))
            if path == ("sharding", "backend") and re.search("zero|deepspeed", str(given), re.I):
                problem = problem.partition("; did you mean")[0] + _STAGES
        case "value_error":
            problem = str(detail["ctx"]["error"])
            if here:  # a rule about several keys of a section
                prefix = f"{_dotted(path)}: " if path else ""
                return f"{_involved(path, problem, origins)}: {prefix}{problem}"
            problem += f", given {_shown(given)}"
            if (below := (*path, problem.partition(" ")[0])) in origins:  # of an argument among others
                return f"{origins[below]}: {_dotted(path)}: {problem}"
        case "model_type" | "model_attributes_type" | "dict_type":
            problem = f"must be a section with keys of its own, given {_shown(given)}{_as_section(path, here, given)}"
        case _:
            problem = re.sub(r"^(Input|Tuple|List|String|Value) should", "must", detail["msg"])
            problem = re.sub(r"\ba valid (integer|number|string|boolean|tuple|array)", _plain, problem)
            problem = problem.replace(" after validation", "") + f", given {_shown(given)}"
    return f"{_origin(path, origins)}: {_dotted(path)}: {problem}"


_STAGES = (
    "; zero0 to zero3 are DeepSpeed's ZeRO: zero1 shards optimizer states, zero2 gradients too, zero3 weights too, and "
    "zero0 nothing"
)


def _as_section(path: KeyPath, here: Sections, given: Any) -> str:
    """What somebody meant who gave a section's kind, or a method, in its place."""
    if not isinstance(given, str):
        return ""
    for section in here:
        for tag in TAGS:
            if tag in section.model_fields and given.lower() in typing.get_args(section.model_fields[tag].annotation):
                return f"; write '{_dotted(path)}={{{tag}: {given.lower()}}}'"
    if path == ("perturbation",):
        name = given.lower() if given.lower() in PRESETS else nearest(given.lower(), PRESETS)
        named = f"; write 'perturbation={{preset: {name}}}'" if name else ""
        return f"{named or '; dense SAM is perturbation.rho=0.05'}, and no perturbation null"
    for section in here:
        for key in ("name", "backend"):
            if key in section.model_fields:
                return f"; write {_dotted((*path, key))}={given}"
    return ""


def _of_deepspeed(path: KeyPath, problem: str, origins: Origins) -> str:
    """About a key of DeepSpeed's configuration: by its name there if it stands in a file of DeepSpeed's own."""
    own = path[len(DEEPSPEED) :]
    first = _origin(path, origins)
    others = [_origin(key, origins) for key in _keys_in(problem) if key in origins]
    name = _dotted(own) if own and first.startswith(f"{origins.get(DEEPSPEED)}:") else _dotted(path)
    return f"{', '.join(dict.fromkeys([first, *others]))}: {name}: {problem}"


def _plain(match: re.Match[str]) -> str:
    words = {"integer": "a whole number", "number": "a number", "string": "text", "boolean": "true or false"}
    return words.get(match[1], "a list")


def _choice(given: Any, choices: list[str]) -> str:
    near = nearest(given, choices) if isinstance(given, str) else None
    hint = f"; did you mean {near}?" if near else ""
    return f"must be {_alternatives(choices)}, given {_shown(given)}{hint}"


def _alternatives(choices: list[str]) -> str:
    return " or ".join(filter(None, [", ".join(choices[:-1]), choices[-1]]))


def _involved(path: KeyPath, problem: str, origins: Origins) -> str:
    """Where the keys that a rule speaks of were given; the section if it names none."""
    keys = [(*path, *word) for word in _keys_in(problem) if (*path, *word) in origins]
    # Keys with dots are certainly keys; one that is a plain word counts only where the sentence begins with it.
    keys = [key for index, key in enumerate(keys) if len(key) > len(path) + 1 or index == 0]
    return ", ".join(dict.fromkeys(_origin(key, origins) for key in keys)) or _origin(path, origins)


def _keys_in(text: str) -> list[KeyPath]:
    """What may be names of keys in a text, dotted or not."""
    return [tuple(word.split(".")) for word in re.findall(r"[a-z0-9_]+(?:\.[a-z0-9_]+)*", text)]


def _origin(path: KeyPath, origins: Origins) -> str:
    while path not in origins:
        path = path[:-1]
    return origins[path]


def _dotted(path: KeyPath) -> str:
    return ".".join(map(str, path))


def _at(values: Any, path: KeyPath) -> Any:
    for item in path:
        values = values[item]
    return values


def _shown(value: Any) -> str:
    shown = json.dumps(value, ensure_ascii=False, default=str)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def resolve(location: tuple[str | int, ...], root: type[BaseModel] = Config) -> tuple[KeyPath, Sections, Sections]:
    """What pydantic calls a location, as the user's key: without the tags that stand for a union's alternatives.

    Args:
        location: pydantic's.
        root: of what kind the whole is.

    Returns:
        The key's path, the sections that may stand there, and the sections that may stand around it.
    """
    path: KeyPath = ()
    around: Sections = []
    here: Sections = [root]
    tagged = several = False
    for item in location:
        if tagged:
            here = [section for section in here if item in _tags(section)] or here
            tagged = False
            continue
        path += (item,)
        if several:  # the name or number of one of them
            several = False
            continue
        several = any(_holds_several(section, item) for section in here)
        around, here = here, sections_at(here, item)
        tagged = len(here) > 1
    return path, here, around


def _tags(section: type[BaseModel]) -> set[Any]:
    literals = (field.annotation for field in section.model_fields.values())
    return {section.__name__}.union(*(typing.get_args(x) for x in literals if typing.get_origin(x) is typing.Literal))


def sections_in(annotation: Any) -> Sections:
    """The sections that a field of this type may hold: none, one, or the alternatives of a union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for argument in typing.get_args(annotation) for section in sections_in(argument)]


def sections_at(sections: Sections, name: str | int) -> Sections:
    """The sections that may stand under `name` in any of `sections`."""
    fields = [section.model_fields[name] for section in sections if name in section.model_fields]
    return [below for field in fields for below in sections_in(field.annotation)]


def _holds_several(section: type[BaseModel], name: str | int) -> bool:
    """Whether a field holds sections by their names, or in a list."""
    field = section.model_fields.get(str(name))
    return field is not None and typing.get_origin(field.annotation) in (dict, tuple, list)


def names(sections: Sections) -> list[str]:
    """Every key that any of `sections` has."""
    return list(dict.fromkeys(name for section in sections for name in section.model_fields))


def dotted_names(sections: Sections = [Config], prefix: str = "") -> Iterator[str]:  # noqa: B006  (never changed)
    """Every key below `sections`, dotted."""
    for name in names(sections):
        yield prefix + name
        yield from dotted_names(sections_at(sections, name), f"{prefix}{name}.")


def comments(section: BaseModel, origins: Origins = MappingProxyType({}), path: KeyPath = ()) -> dict[KeyPath, str]:
    """The meaning of every key below a section, and in brackets where it was given, if it was."""
    result: dict[KeyPath, str] = {}
    for name, field in type(section).model_fields.items():
        value, here = getattr(section, name), (*path, name)
        if isinstance(value, BaseModel):
            meaning = (type(value).__doc__ or "").partition("\n")[0].rstrip(".")
            result |= {here: meaning, **comments(value, origins, here)}
        elif field.description or here in origins:
            result[here] = " ".join(filter(None, (field.description, _given(here, origins))))
        if isinstance(value, dict):  # free keys, which have no meaning here
            below = [key for key in origins if key[:-1] == here and key[-1] in value]
            result |= {key: _given(key, origins) for key in below}
    return result


def _given(path: KeyPath, origins: Origins) -> str:
    """Where a key was given, in a comment's brackets; an override's value, which may be a password, is left out."""
    if path not in origins:
        return ""
    where = "override" if origins[path].startswith(OVERRIDE) else origins[path]
    return f"[{''.join(c if c.isprintable() else '?' for c in where)}]"

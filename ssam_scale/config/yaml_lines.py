"""YAML into plain values and the line of each key, and plain values into YAML with comments.

Read with PyYAML's safe parser but by the scalar rules of YAML 1.2, which are what people expect: `1e-3` is a number,
`on`, `off`, `yes` and `no` are words, `010` is ten, `1:30` and dates are text. Duplicate keys, which PyYAML lets pass
with the last one winning, are errors. There is no infinity and no NaN: no value of a run may be either. (ruamel.yaml
reads 1.2, but adds dates, `1_000` and `0x10` to it, and knows neither where a duplicate's first key stands nor what has
no place in a configuration: the same rules would have to be written on top of it.)
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from ssam_scale.config.section import KeyPath
from ssam_scale.errors import UserError

_SCALARS: dict[str, tuple[re.Pattern[str], str, Callable[[str], Any]]] = {
    "null": (re.compile(r"~|null|Null|NULL|"), "~nN\0", lambda text: None),
    "bool": (re.compile(r"true|True|TRUE|false|False|FALSE"), "tTfF", lambda text: text.lower() == "true"),
    "int": (re.compile(r"[-+]?[0-9]+"), "-+0123456789", int),
    "float": (
        re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"),
        "-+.0123456789",
        float,
    ),
}


_CHARACTERS, _NODES, _DEPTH, _DIGITS = 2**20, 10_000, 32, 50
"""Of a configuration, at most: a few lines whose anchors repeat each other, or a number of a million digits, would take
hours and all memory. The largest of ours has some 150 nodes, 5 deep."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (PyYAML's own name: none of YAML 1.1's rules)


class _Dumper(yaml.SafeDumper):
    """Quotes a text whenever it would be something else by YAML 1.1 or by 1.2."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _name, (_pattern, _first, _) in _SCALARS.items():
    for _class in (_Loader, _Dumper):
        _anchored = re.compile(rf"(?:{_pattern.pattern})\Z")
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", _anchored, ["" if c == "\0" else c for c in _first])


def _write_text(dumper: _Dumper, value: str) -> yaml.Node:
    # PyYAML writes some line breaks (U+0085 among them) such that they come back as others; escapes are safe.
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=None if value.isprintable() else '"')


def _write_list(dumper: _Dumper, value: list[Any]) -> yaml.Node:
    return dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=True)


_Dumper.add_representer(str, _write_text)
_Dumper.add_representer(list, _write_list)


def text_of(path: Path, encoding: str = "utf-8") -> str:
    """What a file of settings says; of a longer one, or a device that never ends, no more than is too much.

    Raises:
        OSError, UnicodeDecodeError: it cannot be read, or is no text.
    """
    with path.open("rb") as file:
        data = file.read(4 * _CHARACTERS + 1)
    return io.TextIOWrapper(io.BytesIO(data), encoding).read()  # with the line breaks of any system


def parse(text: str, where: str) -> tuple[Any, dict[KeyPath, int]]:
    """Values of one YAML document, and the line of every key and list item.

    Args:
        text: the document.
        where: its name in errors.

    Raises:
        UserError: it is not YAML, or has duplicate keys or types of its own.
    """
    if len(text) > _CHARACTERS:
        raise UserError(f"{where}: not a configuration: it is longer than {_CHARACTERS:,} characters")
    try:
        node = _Loader(text).get_single_node()
    except RecursionError:
        raise UserError(f"{where}: not a configuration: it is nested deeper than {_DEPTH} levels") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{where}:{mark.line + 1}:{mark.column + 1}" if mark else where
        context = f" {error.context}" if error.context else ""
        if "'\\t'" in str(error.problem):
            raise UserError(f"{place}: not YAML: a tab; lines are indented with spaces") from None
        if not text.count("\n"):  # an override: its place says it all
            place = where
        raise UserError(f"{place}: not YAML: {error.problem}{context}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        character = chr(error.character) if isinstance(error.character, int) else error.character
        raise UserError(f"{where}:{line}: not YAML: character {character!r} is not allowed") from None
    lines: dict[KeyPath, int] = {}
    value = None if node is None else _value(node, (), lines, where, frozenset(), itertools.count(1))
    return value, lines


def _value(
    node: yaml.Node,
    path: KeyPath,
    lines: dict[KeyPath, int],
    where: str,
    above: frozenset[int],
    counted: Iterator[int],
) -> Any:
    here = f"{where}:{node.start_mark.line + 1}"
    if next(counted) > _NODES:
        raise UserError(f"{here}: not a configuration: more than {_NODES:,} values, an anchor's counted each time")
    if len(above) > _DEPTH:
        raise UserError(f"{here}: not a configuration: it is nested deeper than {_DEPTH} levels")
    kind = node.tag.removeprefix("tag:yaml.org,2002:")
    if id(node) in above:
        raise UserError(f"{here}: the anchor contains itself")
    above |= {id(node)}
    if isinstance(node, yaml.MappingNode) and kind == "map":
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise UserError(f"{where}:{line}: a key must be a word, not a list or a section")
            key = key_node.value
            if key == "<<" and key_node.style is None and len(path) < 2:  # deeper, only free texts are keys
                raise UserError(
                    f"{where}:{line}: << (merging an anchor's keys) is not supported; repeat the keys, or put them "
                    "into a file of their own and say include: FILE"
                )
            if key in result:
                full = ".".join(map(str, (*path, key)))
                raise UserError(f"{where}:{line}: {full}: given twice, first in line {lines[(*path, key)]}")
            lines[(*path, key)] = line
            result[key] = _value(value_node, (*path, key), lines, where, above, counted)
        return result
    if isinstance(node, yaml.SequenceNode) and kind == "seq":
        for index, item in enumerate(node.value):
            lines[(*path, index)] = item.start_mark.line + 1
        return [_value(item, (*path, index), lines, where, above, counted) for index, item in enumerate(node.value)]
    if isinstance(node, yaml.ScalarNode):
        if kind == "str":
            return node.value
        if kind in ("int", "float") and len(node.value) > _DIGITS:
            raise UserError(f"{here}: a number of {len(node.value):,} characters; {_DIGITS} are enough for any")
        if kind in _SCALARS and _SCALARS[kind][0].fullmatch(node.value):
            return _SCALARS[kind][2](node.value)
    tag = node.tag.replace("tag:yaml.org,2002:", "!!")
    raise UserError(f"{here}: the type {tag} has no place in a configuration")


def write(data: Any, comments: dict[KeyPath, str]) -> str:
    """Block-style YAML in the order of `data`, with a comment at the end of the lines of the keys that have one."""
    text = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**9, default_flow_style=False)
    _, keys = parse(text, "dump")
    lines = text.split("\n")
    for path, comment in comments.items():
        lines[keys[path] - 1] += f"  # {comment}"
    return "\n".join(lines)

"""A YAML file's sections, on top of those of the files that it includes, and where each key stands.

`include: base.yaml`, or a list of files, relative to the file that says so. Sections are merged key by key; a later
file's keys replace those of the files before it, and a file's own replace all that it includes. Lists are values. A
section that says to be of another kind than it was (another pattern of a mask, another preset) begins anew.
"""

from __future__ import annotations

import difflib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ssam_scale.config.section import TAGS, KeyPath, home
from ssam_scale.config.yaml_lines import parse, text_of
from ssam_scale.errors import UserError

Sections = dict[str, Any]
Origins = dict[KeyPath, str]

INCLUDE = "include"
"""The key that says so."""
_FILES = 64
"""At most, each as often as it is included: files that include others twice, deep down, would take for ever."""

_KINDS = ("preset", *TAGS)
"""What tells of which kind a section is: one that comes later may depend on those before it."""


def read(path: Path, what: str, like: str) -> tuple[Sections, Origins]:
    """The sections of a YAML file and of those it includes, and where each key stands, of the empty key, the file.

    Args:
        path: the file.
        what: it is to be, in the words of the error.
        like: a folder of good ones, likewise.

    Raises:
        UserError: it, or a file that it includes, cannot be read or is no section.
    """
    values, origins = _whole(path, what, like, (), itertools.count(1))
    return values, {(): str(path), **origins}


def _whole(
    path: Path, what: str, like: str, chain: tuple[Path, ...], counted: Iterator[int]
) -> tuple[Sections, Origins]:
    own, lines = parse(_text(path), str(path))
    if own is None:
        raise UserError(f"{path}: is empty; start from one of the files in {like}")
    if not isinstance(own, dict):
        raise UserError(f"{path}:1: {what} is a section with keys, this is {json.dumps(own)[:60]}")
    own_origins = {key: f"{path}:{line}" for key, line in lines.items() if key[0] != INCLUDE}
    if INCLUDE not in own:
        return own, own_origins
    values: Sections = {}
    origins: Origins = {}
    chain = (*chain, path.resolve())
    for number, given in enumerate(_listed(own.pop(INCLUDE), f"{path}:{lines[INCLUDE,]}")):
        where = f"{path}:{lines.get((INCLUDE, number), lines[INCLUDE,])}: {INCLUDE}"
        try:
            base = path.parent / home(Path(given))
            place = base.resolve()
        except (OSError, RuntimeError, ValueError) as error:  # links in a circle, a null byte, a variable not set
            raise UserError(f"{where}: {given!r}: is no file that can be read: {error}") from None
        if place in chain:
            raise UserError(f"{where}: {given}: includes itself, by way of {' and '.join(map(str, chain))}")
        if next(counted) > _FILES:
            raise UserError(f"{where}: {given}: more than {_FILES} files are included")
        try:
            below, its_origins = _whole(base, what, like, chain, counted)
        except RecursionError:
            raise UserError(f"{where}: {given}: files include each other too deeply") from None
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        _merge(values, origins, below, its_origins, ())
    _merge(values, origins, own, own_origins, ())
    return values, origins


def _listed(given: Any, where: str) -> list[str]:
    files = given if isinstance(given, list) else [given]
    if not files or not all(isinstance(file, str) and file for file in files):
        raise UserError(f"{where}: {INCLUDE}: must be a file's name or a list of them, given {json.dumps(given)[:60]}")
    return files


def _merge(values: Sections, origins: Origins, later: Sections, its_origins: Origins, path: KeyPath) -> None:
    """Put the keys of a section that comes later into one that was there, in place."""
    for kind in _KINDS:
        if kind in later and later[kind] != values.get(kind):
            kept = {key: values[key] for key in _KINDS[: _KINDS.index(kind)] if key in values}
            for key in values.keys() - kept.keys():
                _forget(origins, (*path, key))
            values.clear()
            values.update(kept)
            break
    for key, value in later.items():
        here = (*path, key)
        if isinstance(value, dict) and isinstance(values.get(key), dict):
            origins[here] = its_origins[here]
            _merge(values[key], origins, value, its_origins, here)
            continue
        _forget(origins, here)
        values[key] = value
        origins.update({known: line for known, line in its_origins.items() if known[: len(here)] == here})


def _forget(origins: Origins, path: KeyPath) -> None:
    for known in [known for known in origins if known[: len(path)] == path]:
        del origins[known]


def _text(path: Path) -> str:
    try:
        return text_of(path)
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise UserError(f"{path}: no such file: there is no folder {path.parent}") from None
        there = sorted(p.name for p in path.parent.iterdir() if p.suffix in (".yaml", ".yml"))
        near = difflib.get_close_matches(path.name, there, n=3, cutoff=0.5) or there[:8]
        which = f"the nearest in {path.parent} {'is' if len(near) == 1 else 'are'} {', '.join(near)}"
        hint = which if near else f"no YAML files in {path.parent}"
        raise UserError(f"{path}: no such file; {hint}") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; give the YAML file of a run") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file (byte {error.start} is not UTF-8)") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:  # a null byte
        raise UserError(f"{str(path)!r}: cannot be read: {error}") from None

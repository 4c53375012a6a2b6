"""Results as files: JSON and CSV of rows, and writing that is done whole or not at all."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path

from ssam_scale import folders
from ssam_scale.errors import UserError
from ssam_scale.folders import why_not_writable
from ssam_scale.tracking.compare.rows import Row


def as_json(rows: Sequence[Row]) -> str:
    """The rows with all attributes."""
    return json.dumps([asdict(row) for row in rows], indent=2, ensure_ascii=False)


def as_csv(rows: Sequence[Row]) -> str:
    """The same as a table: intervals in two columns, `…_low` and `…_high`, notes and ids of runs as text."""
    out = io.StringIO()
    flat = [_flat(row) for row in rows]
    writer = csv.DictWriter(out, list(flat[0]) if flat else [f.name for f in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return out.getvalue()


def _flat(row: Row) -> dict[str, object]:
    result: dict[str, object] = {}
    for key, value in asdict(row).items():
        if key.endswith("interval"):
            low, high = value or (None, None)
            result |= {f"{key}_low": low, f"{key}_high": high}
        elif isinstance(value, Mapping):
            result[key] = "; ".join(f"{about}: {note}" for about, note in value.items())
        elif isinstance(value, tuple):
            result[key] = " ".join(value)
        else:
            result[key] = value
    return result


def check_output(option: str, path: Path) -> None:
    """Check where a result is to go, before anything is read.

    Args:
        option: of the command line, which names the path.
        path: of a file, which need not be there.

    Raises:
        UserError: it cannot be written.
    """
    if path.is_dir():
        raise UserError(f"{option} {path} is a folder; name a file in it, e.g. {path / f'comparison.{option[2:]}'}")
    if _is_special(path):
        return
    if not path.parent.exists():
        raise UserError(f"{option} {path}: there is no folder {path.parent}; make it, or name one that is there")
    problem = why_not_writable(path.parent)
    if problem is not None:
        raise UserError(f"{option} {path}: {problem}")
    if path.exists() and not os.access(path, os.W_OK):
        raise UserError(f"{option} {path} is there already and may not be written to by this user")


def write_whole(option: str, path: Path, text: str) -> None:
    """Write a file, in whose place a reader finds the old one or all of the new one.

    Args:
        option: of the command line, which names the path.
        path: of the file.
        text: that it is to hold.

    Raises:
        UserError: it cannot be written.
    """
    path = path.resolve()  # a link stays one
    try:
        if _is_special(path):
            path.write_text(text, encoding="utf-8", errors="replace")
            return
        folders.write_whole(path, lambda beside: beside.write_text(text, encoding="utf-8", errors="replace"))
    except OSError as error:
        raise UserError(f"{option} {path}: {error.strerror or error}") from error


def _is_special(path: Path) -> bool:
    """Whether it is a device or a pipe, such as /dev/stdout, in whose place nothing can be put."""
    return path.exists() and not path.is_file()

"""Rows of measurements as JSON or as a table, and on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ssam_scale.console import console
from ssam_scale.errors import UserError

AsJson = Annotated[bool, typer.Option("--json", help="Print rows as JSON.")]

RecordIn = Annotated[
    Path | None,
    typer.Option(
        "--record",
        metavar="FOLDER",
        help="Also write the table and its raw rows there: [what]_[hardware]_[date].md and .json.",
    ),
]

Columns = dict[str, tuple[str, float, str]]  # title: key of a row, factor, format


def show(rows: Sequence[Mapping[str, Any]], columns: Columns, caption: str, as_json: bool, name: str = "what") -> None:
    """Print rows as JSON, or as a table in which a dash stands for what was not measured.

    Args:
        rows: what was measured.
        columns: what a table shows of them.
        caption: below a table.
        as_json: print JSON.
        name: key of a table's first column.
    """
    if as_json:
        print(json.dumps(list(rows), indent=2))
        return
    table = Table(caption=caption, caption_justify="left")
    table.add_column(name)
    for title in columns:
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(*_cells(row, columns, name))
    console().print(table)


def markdown(rows: Sequence[Mapping[str, Any]], columns: Columns, name: str = "what") -> list[str]:
    """Lines of the same table in Markdown."""
    aligned = " | ".join("---:" for _ in columns)
    lines = [f"| {' | '.join([name, *columns])} |", f"| --- | {aligned} |"]
    return lines + [f"| {' | '.join(_cells(row, columns, name))} |" for row in rows]


def _cells(row: Mapping[str, Any], columns: Columns, name: str) -> list[str]:
    shown = [str(row[name])]
    for key, factor, form in columns.values():
        value = row.get(key)
        if isinstance(value, bool):
            shown.append("yes" if value else "NO")
        else:
            shown.append("—" if value is None else format(factor * value, form))
    return shown


def check_record(folder: Path | None) -> None:
    """Check the folder of `--record`, before anything is measured.

    Raises:
        UserError: it is not a folder, or nothing can be written there.
    """
    if folder is None:
        return
    if not folder.is_dir():
        raise UserError(f"--record is {folder}, which is not a folder; make it, or name one that is there")
    if not os.access(folder, os.W_OK):
        raise UserError(f"--record is {folder}, where this user may not write")


def at_least(least: int, **options: int | None) -> None:
    """Check numbers given on the command line, by the option's name with underscores; None was not given.

    Raises:
        UserError: one is below `least`.
    """
    for name, value in options.items():
        if value is not None and value < least:
            given = f"--{name.replace('_', '-')} is {value}"
            raise UserError(f"{given}; at least {least} {'is' if least == 1 else 'are'} needed")

"""Rows of measurements as JSON or as a table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer
from rich.table import Table

from ssam_scale.console import console
from ssam_scale.errors import UserError

AsJson = Annotated[bool, typer.Option("--json", help="Print rows as JSON.")]

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
        shown = []
        for key, factor, form in columns.values():
            value = row.get(key)
            if isinstance(value, bool):
                shown.append("yes" if value else "NO")
            else:
                shown.append("—" if value is None else format(factor * value, form))
        table.add_row(row[name], *shown)
    console().print(table)


def at_least(least: int, **options: int | None) -> None:
    """Check numbers given on the command line, by the option's name with underscores; None was not given.

    Raises:
        UserError: one is below `least`.
    """
    for name, value in options.items():
        if value is not None and value < least:
            given = f"--{name.replace('_', '-')} is {value}"
            raise UserError(f"{given}; at least {least} {'is' if least == 1 else 'are'} needed")

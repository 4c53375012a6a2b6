"""Rows of measurements as JSON or as a table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

Columns = dict[str, tuple[str, float, str]]  # title: key of a row, factor, format

# Width of tables that go to a file or a pipe, where there is no terminal to ask.
_PIPE_COLUMNS = 160


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
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_PIPE_COLUMNS)
    console.print(table)

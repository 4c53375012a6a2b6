"""Rows of measurements as JSON or as a table, and on disk."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.table import Table
from rich.text import Text

from ssam_scale.cli.paths import expanded
from ssam_scale.console import console
from ssam_scale.errors import UserError

AsJson = Annotated[bool, typer.Option("--json", help="Print rows as JSON.")]

RecordIn = Annotated[
    Path | None,
    typer.Option(
        "--record",
        metavar="FOLDER",
        callback=expanded,
        help="Also write the table and its raw rows there: [what]_[hardware]_[date].md and .json.",
    ),
]

Columns = dict[str, tuple[str, float, str]]  # title: key of a row, factor, format


def show(
    rows: Sequence[Mapping[str, Any]],
    columns: Columns,
    caption: str,
    as_json: bool,
    name: str = "what",
    spare: Sequence[str] = (),
) -> None:
    """Print rows as JSON, or as a table in which a dash stands for what was not measured.

    Args:
        rows: what was measured.
        columns: what a table shows of them.
        caption: below a table.
        as_json: print JSON.
        name: key of a table's first column.
        spare: see `Sheet`.
    """
    if as_json:
        print(json.dumps(list(rows), indent=2))
        return
    console().print(Sheet([name, *columns], [_cells(row, columns, name) for row in rows], caption, spare=spare))


@dataclass(frozen=True)
class Sheet:
    """A table for a terminal of any width: a grid where it fits with every word and number whole, else a block per row.

    Attributes:
        titles: of the columns.
        rows: cells, as many each as there are titles.
        caption: lines below the table; empty for none.
        words: how many of the first columns hold words, which stand on the left and are wrapped between words; the
            others hold numbers, which stand on the right and in one line.
        spare: titles of columns that a narrow terminal may do without, the first one first; a line says which it does.
    """

    titles: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    words: int = 1
    spare: Sequence[str] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """What rich prints."""
        grid = self._fitting(options.max_width)
        if grid is not None:
            yield grid
        else:
            for number, row in enumerate(self.rows):
                yield from self._block(row, number > 0)
            yield ""
        if self.caption:
            yield Text(self.caption, "table.caption")

    def _fitting(self, width: int) -> RenderableType | None:
        """A grid with as many of the columns as fit, and lines between them rather than without; None if none fits."""
        for left_out in range(len(self.spare) + 1):
            sheet = self._without(self.spare[:left_out])
            grid = sheet._grid(width, lines=True) or sheet._grid(width, lines=False)
            if grid is not None:
                names = ", ".join(title for title in self.titles if title not in sheet.titles)
                return Group(grid, Text(f"left out for want of width: {names}", "table.caption")) if names else grid
        return None

    def _without(self, titles: Sequence[str]) -> Sheet:
        kept = [number for number, title in enumerate(self.titles) if title not in titles]
        words = sum(number < self.words for number in kept)
        rows = [[row[number] for number in kept] for row in self.rows]
        return Sheet([self.titles[number] for number in kept], rows, self.caption, words)

    def _grid(self, width: int, *, lines: bool) -> Table | None:
        """A grid of at most `width` columns of text; None if something would have to be broken for it."""
        table = (
            Table(box=box.HEAVY_HEAD)
            if lines
            else Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
        )
        count = len(self.titles)
        columns = list(zip(self.titles, *self.rows, strict=True))
        fewest = [
            max(_longest_word(cell) if place == 0 or number < self.words else cell_len(cell) for place, cell in column)
            for number, column in enumerate(enumerate(cells) for cells in columns)
        ]
        spare = width - sum(fewest) - (3 * count + 1 if lines else 2 * count - 2)
        if spare < 0:
            return None
        # rich would shorten the widest column, whatever its words need; here each gets what it needs, then what it can.
        for number, (title, *cells) in enumerate(columns):
            more = min(spare, max(map(cell_len, (title, *cells))) - fewest[number])
            spare -= more
            left = number < self.words
            table.add_column(title, justify="left" if left else "right", width=fewest[number] + more)
        for row in self.rows:
            table.add_row(*row)
        return table

    def _block(self, row: Sequence[str], again: bool) -> Iterator[RenderableType]:
        """A row by itself: its first cell, and below it a line for each other."""
        yield Text(f"\n{row[0]}" if again else row[0], "bold")
        block = Table.grid(padding=(0, 2, 0, 0))
        block.add_column(min_width=2)
        block.add_column(min_width=max(map(_longest_word, self.titles[1:]), default=0))
        block.add_column(overflow="fold")
        for title, cell in zip(self.titles[1:], row[1:], strict=True):
            block.add_row("", title.strip(), cell)
        yield block


def _longest_word(text: str) -> int:
    """In columns of text; a stroke between words stays with the one before it."""
    return max(map(cell_len, re.split(r"\s+(?!/)", text.strip())))


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

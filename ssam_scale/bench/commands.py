"""`ssam-scale bench`: the plain functions behind the commands."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ssam_scale.errors import UserError

app = typer.Typer(help="Measure parts of the package on this machine.", no_args_is_help=True)

# Width of tables that go to a file or a pipe, where there is no terminal to ask.
_PIPE_COLUMNS = 160


@app.callback()
def _group() -> None:
    """Measure parts of the package on this machine."""


@app.command("masks")
def masks_command(
    scores: Annotated[int, typer.Option(help="Scores over all processes.")] = 86_000_000,
    ranks: Annotated[list[int] | None, typer.Option(help="Processes; may be given several times. [1 and 2]")] = None,
    repeats: Annotated[int, typer.Option(help="Repetitions, of which the median counts.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print rows as JSON.")] = False,
) -> None:
    """Choose half of the scores: time and memory, and those of concatenating them and calling torch.topk."""
    from ssam_scale.bench.masks import bench_masks

    sizes = ranks or [1, 2]
    for option, value in (("scores", scores), ("repeats", repeats), *(("ranks", size) for size in sizes)):
        if value < 1:
            raise UserError(f"--{option} is {value}; at least 1 is needed")
    rows = bench_masks(scores, sizes, repeats)
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_PIPE_COLUMNS)
    console.print(_masks_table(rows))


def _masks_table(rows: list[dict[str, Any]]) -> Table:
    """The rows as a table; what was not measured is a dash."""
    columns = {
        "ms": ("seconds", 1e3, ",.1f"),
        "topk ms": ("topk_seconds", 1e3, ",.1f"),
        "topk / ours": ("topk_time_over_ours", 1.0, ".1f"),
        "unsorted topk / ours": ("unsorted_topk_time_over_ours", 1.0, ".1f"),
        "extra bytes per weight": ("extra_bytes_per_weight", 1.0, ".3f"),
        "of topk": ("topk_extra_bytes_per_weight", 1.0, ".1f"),
        "bytes to collectives": ("collective_bytes", 1.0, ",.0f"),
        "by topk": ("topk_collective_bytes", 1.0, ",.0f"),
    }
    table = Table(caption=f"{rows[0]['device']}; medians of {rows[0]['repeats']}", caption_justify="left")
    table.add_column("what")
    for name in ("scores", "ranks", "exact", *columns):
        table.add_column(name, justify="right")
    for row in rows:
        shown = [
            "—" if row.get(key) is None else format(factor * row[key], form) for key, factor, form in columns.values()
        ]
        table.add_row(row["what"], f"{row['scores']:,}", str(row["ranks"]), "yes" if row["exact"] else "NO", *shown)
    return table

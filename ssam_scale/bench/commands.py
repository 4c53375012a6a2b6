"""`ssam-scale bench`: the plain functions behind the commands."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ssam_scale.errors import UserError

app = typer.Typer(help="Measure parts of the package on this machine.", no_args_is_help=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print rows as JSON.")]

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
    means: Annotated[bool, typer.Option("--means", help="Also the means over rows that row masks need.")] = False,
    as_json: AsJson = False,
) -> None:
    """Choose half of the scores: time and memory, and those of concatenating them and calling torch.topk."""
    from ssam_scale.bench.masks import bench_masks

    sizes = ranks or [1, 2]
    for option, value in (("scores", scores), ("repeats", repeats), *(("ranks", size) for size in sizes)):
        if value < 1:
            raise UserError(f"--{option} is {value}; at least 1 is needed")
    rows = bench_masks(scores, sizes, repeats, means)
    _show(rows, _MASKS, f"{rows[0]['device']}; medians of {rows[0]['repeats']}", as_json)


@app.command("storage")
def storage_command(
    weights: Annotated[int, typer.Option(help="Weights of the model.")] = 86_000_000,
    as_json: AsJson = False,
) -> None:
    """Memory that masks of each pattern take, always and while their weights are perturbed."""
    from ssam_scale.bench.storage import bench_storage

    if weights < 1000:
        raise UserError(f"--weights is {weights}; at least 1000 are needed")
    rows = bench_storage(weights)
    _show(rows, _STORAGE, rows[0]["device"], as_json)


Columns = dict[str, tuple[str, float, str]]  # title: key of a row, factor, format
_MASKS: Columns = {
    "scores": ("scores", 1, ",d"),
    "ranks": ("ranks", 1, "d"),
    "exact": ("exact", 1, ""),
    "ms": ("seconds", 1e3, ",.1f"),
    "topk ms": ("topk_seconds", 1e3, ",.1f"),
    "topk / ours": ("topk_time_over_ours", 1.0, ".1f"),
    "unsorted topk / ours": ("unsorted_topk_time_over_ours", 1.0, ".1f"),
    "extra bytes per weight": ("extra_bytes_per_weight", 1.0, ".3f"),
    "of topk": ("topk_extra_bytes_per_weight", 1.0, ".1f"),
    "bytes to collectives": ("collective_bytes", 1.0, ",.0f"),
    "by topk": ("topk_collective_bytes", 1.0, ",.0f"),
}
_STORAGE: Columns = {
    "weights": ("weights", 1, ",d"),
    "density": ("density", 1, ".3f"),
    "restored exactly": ("exact", 1, ""),
    "persistent bytes per weight": ("persistent_bytes_per_weight", 1.0, ".4f"),
    "transient bytes per weight": ("transient_bytes_per_weight", 1.0, ".3f"),
    "transient / (density × weights)": ("transient_over_perturbed", 1.0, ".3f"),
}


def _show(rows: list[dict[str, Any]], columns: Columns, caption: str, as_json: bool) -> None:
    """Print rows as JSON, or as a table in which a dash stands for what was not measured."""
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    table = Table(caption=caption, caption_justify="left")
    table.add_column("what")
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
        table.add_row(row["what"], *shown)
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_PIPE_COLUMNS)
    console.print(table)

"""`ssam-scale compare`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from ssam_scale.cli.table import AsJson, Sheet
from ssam_scale.console import console

if TYPE_CHECKING:
    from ssam_scale.tracking.compare import Row


def compare_command(
    tracking_uri: Annotated[
        str, typer.Option("--tracking-uri", help="MLflow tracking URI, e.g. http://host:5000.")
    ] = "sqlite:///mlflow.db",
    experiment: Annotated[str, typer.Option("--experiment", help="MLflow experiment.")] = "ssam_scale",
    group: Annotated[str | None, typer.Option("--group", help="Only runs with this value of the tag `group`.")] = None,
    as_json: AsJson = False,
) -> None:
    """Compare finished runs: top-1, step time, time over the base optimizer, saving over dense SAM."""
    from ssam_scale.tracking.commands import interface_lines
    from ssam_scale.tracking.compare import compare, find_experiment

    rows = compare(tracking_uri, experiment, group=group)
    if as_json:
        print(json.dumps([asdict(row) for row in rows], indent=2, ensure_ascii=False))
        return
    console().print(render(rows))
    _, experiment_id = find_experiment(tracking_uri, experiment)
    for line in interface_lines(tracking_uri, experiment_id):
        # Not through the console: it would break a command that is to be copied.
        print(line)


def render(rows: list[Row]) -> Sheet:
    """The rows as a table for a terminal; what is missing is a dash with a numbered note below."""
    notes = list(dict.fromkeys(note for row in rows for note in row.notes))
    # What is the same in all rows needs no column.
    several = {
        "model": len({row.model for row in rows}) > 1,
        "backend": len({row.backend for row in rows}) > 1,
        "settings": any(row.settings for row in rows),
    }
    words = [title for title in ("method", "model", "backend", "mask", "settings") if several.get(title, True)]
    cells = []
    for row in rows:
        marks = "".join(f" [{notes.index(note) + 1}]" for note in row.notes)
        cells.append(
            [
                *(getattr(row, title) or "—" for title in words),
                _shown(row.density, lambda value: f"{100 * value:.0f}%"),
                str(row.runs),
                _shown(row.top1, lambda value: f"{value:.2f}")
                + ("" if row.top1_sd is None else f" ± {row.top1_sd:.2f}"),
                _shown(row.step_seconds, lambda value: f"{1000 * value:.1f}"),
                _shown(row.time_over_base, lambda value: f"{value:.2f}")
                + (marks if row.time_over_base is None else ""),
                _shown(row.saving_over_sam, _percent)
                + ("" if row.saving_interval is None else " ({} to {})".format(*map(_percent, row.saving_interval)))
                + (marks if row.time_over_base is not None else ""),
            ]
        )
    return Sheet(
        [*words, "density", "runs", "top-1 %", "step ms", "time / base", "saving over SAM"],
        cells,
        "\n".join(f"[{number}] {note}" for number, note in enumerate(notes, 1)),
        words=len(words),
    )


def _percent(value: float) -> str:
    return f"{100 * value:.0f}%".replace("-", "−")


def _shown(value: float | None, form: Callable[[float], str]) -> str:
    return "—" if value is None else form(value)

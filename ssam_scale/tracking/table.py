"""The comparison as a table for a terminal."""

from __future__ import annotations

from collections.abc import Callable

from rich.table import Table

from ssam_scale.tracking.compare import Row


def render(rows: list[Row]) -> Table:
    """The rows as a table for a terminal; what is missing is a dash with a numbered note below."""
    notes = list(dict.fromkeys(note for row in rows for note in row.notes))
    several_models = len({row.model for row in rows}) > 1
    with_settings = any(row.settings for row in rows)
    caption = "\n".join(f"[{number}] {note}" for number, note in enumerate(notes, 1))
    table = Table(caption=caption.replace("[", r"\[") or None, caption_justify="left")
    left = ["method", *(["model"] if several_models else []), "mask", *(["settings"] if with_settings else [])]
    for name in left:
        table.add_column(name, overflow="fold")
    for name in ("density", "runs", "top-1 %", "step ms", "time / base", "saving over SAM"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        marks = "".join(rf" \[{notes.index(note) + 1}]" for note in row.notes)
        table.add_row(
            row.method,
            *([row.model] if several_models else []),
            row.mask or "—",
            *([row.settings or "—"] if with_settings else []),
            _shown(row.density, lambda value: f"{100 * value:.0f}%"),
            str(row.runs),
            _shown(row.top1, lambda value: f"{value:.2f}") + ("" if row.top1_sd is None else f" ± {row.top1_sd:.2f}"),
            _shown(row.step_seconds, lambda value: f"{1000 * value:.1f}"),
            _shown(row.time_over_base, lambda value: f"{value:.2f}") + (marks if row.time_over_base is None else ""),
            _shown(row.saving_over_sam, lambda value: f"{100 * value:.0f}%".replace("-", "−"))
            + (marks if row.time_over_base is not None else ""),
        )
    return table


def _shown(value: float | None, form: Callable[[float], str]) -> str:
    return "—" if value is None else form(value)

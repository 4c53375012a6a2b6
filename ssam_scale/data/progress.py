"""Bars on standard error, and what stands in their place where there is no terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from ssam_scale.console import console

Advance = Callable[[int], None]


class _Rate(ProgressColumn):
    """Images a second, where a task counts images."""

    def render(self, task: Task) -> Text:
        unit, speed = task.fields.get("unit"), task.finished_speed or task.speed
        return Text("" if unit is None or not speed else f"{speed:,.0f} {unit}/s")


def pace(task: Task) -> str:
    """Images a second and the time left, for the end of a line."""
    if not task.speed:
        return ""
    left = "" if task.time_remaining is None else f", {timedelta(seconds=task.time_remaining)} left"
    return f", {task.speed:,.0f} images/s{left}"


def progress_bar(shown: bool) -> Progress:
    """A bar on standard error with the time left, and images/s of tasks whose `unit` these are."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
        console=console(stderr=True),
        disable=not shown,
    )


@contextmanager
def progress_of_bytes(description: str, total: int, shown: bool = True) -> Iterator[Advance]:
    """A bar with the remaining time for a stretch measured in bytes, of which some may be passed over."""
    with progress_bar(shown) as bar:
        task = bar.add_task(description, total=total)
        yield lambda count: bar.advance(task, count)
        bar.update(task, completed=total)

"""What a person sees while a run goes on."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from types import TracebackType
from typing import TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ssam_scale.console import console

T = TypeVar("T")

_LINE_SECONDS = 30.0


class StepProgress:
    """A bar with the time left on a terminal; elsewhere (a log file) a line with it twice a minute.

    Args:
        total: steps of the whole run.
        done: steps that were done before.
        visible: false on the processes that do not print.
    """

    def __init__(self, total: int, done: int, visible: bool) -> None:
        self._console = console(quiet=not visible)
        self._total, self._done, self._first = total, done, done
        self._started = self._printed = time.monotonic()
        self._text = ""
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
            console=self._console,
            disable=not (visible and self._console.is_terminal),
        )
        self._task = self._bar.add_task("training", total=total, completed=done, unit="steps", text="")

    def __enter__(self) -> StepProgress:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._bar.stop()

    def advance(self) -> None:
        """One step is done."""
        self._done += 1
        self._bar.update(self._task, advance=1)
        now = time.monotonic()
        if not self._console.is_terminal and now - self._printed >= _LINE_SECONDS:
            self._printed = now
            rate = (now - self._started) / (self._done - self._first)
            left = timedelta(seconds=round(rate * (self._total - self._done)))
            self._console.print(f"step {self._done}/{self._total}, {left} left, {self._text}", soft_wrap=True)

    def show(self, text: str) -> None:
        """The latest figures."""
        self._text = text
        self._bar.update(self._task, text=text)

    def track(self, items: Iterable[T], label: str, total: int) -> Iterator[T]:
        """Pass on `items`, `total` batches, with a bar of their own below."""
        task = self._bar.add_task(label, total=total, unit="batches", text="")
        try:
            for item in items:
                yield item
                self._bar.advance(task)
        finally:
            self._bar.remove_task(task)

    def say(self, text: str) -> None:
        """A line that stays."""
        self._console.print(text, soft_wrap=True)

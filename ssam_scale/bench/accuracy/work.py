"""Doing what is left of a study, one run after the other, and how long it is going to take."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

from ssam_scale.config.study import LoadedStudy
from ssam_scale.errors import UserError

from .cells import Cell, Cells, Lines
from .results import Results

# In a row: then it is the machine that fails, and not a method.
_FAILURES = 3


class Work:
    """A study and what has finished of it.

    Args:
        loaded: the study.
        folder: where its results are.
        only: do the runs of these methods only; empty: of all.
        seeds: of each method, at most; None: the study's.

    Raises:
        UserError: the results cannot be read, or there is no such method.
    """

    def __init__(self, loaded: LoadedStudy, folder: Path, only: Sequence[str] = (), seeds: int | None = None) -> None:
        for name in only:
            if name not in loaded.study.methods:
                raise UserError(
                    f"--only {name!r} is no method of the study; there are {', '.join(loaded.study.methods)}"
                )
        self._loaded, self._only, self._seeds = loaded, set(only), seeds
        self._cells = Cells(loaded)
        self.results = Results(folder)

    def left(self) -> list[Cell]:
        """The runs that have not finished, in the order in which they are done."""
        lines = self.results.lines
        return [
            cell
            for cell in self._cells.all(lines, self._seeds)
            if (not self._only or cell.method in self._only)
            and (cell.knobs is None or self._cells.key(cell) not in lines)
        ]

    @property
    def set_aside(self) -> int:
        """Lines that no longer belong to the study, because it was changed."""
        ours = {self._cells.key(cell) for cell in self._cells.all(self.results.lines) if cell.knobs is not None}
        return sum(key not in ours for key in self.results.lines)

    def do(self, run: Callable[[Cell, str], dict[str, object]], say: Callable[[str], None]) -> None:
        """Do what is left.

        Args:
            run: trains, given a run and its key; returns its line.
            say: is told of each run.

        Raises:
            UserError: runs have failed, which the others did not wait for; the message is the first one's.
        """
        failures: list[str] = []
        failed: set[str] = set()
        in_a_row = 0
        while True:
            left = self.left()
            cell = next((c for c in left if c.knobs is not None and c.method not in failed), None)
            if cell is None or in_a_row == _FAILURES:
                break
            try:
                line = run(cell, self._cells.key(cell))
            except UserError as error:
                failures.append(str(error))
                failed.add(cell.method)
                in_a_row += 1
                say(f"failed, and {cell.method} is left for the next time: {error}")
                continue
            in_a_row = 0
            self.results.append(line)
            top1 = "diverged" if line["top1"] is None else f"{line['top1']:.2f}%"
            rest = [c for c in left if c is not cell]
            say(f"{cell.name}: {top1} in {line['wall_seconds']:.0f} s; {in_time(estimate(rest, self.results.lines))}")
        if failures:
            more = f" (and {len(failures) - 1} more failed)" if len(failures) > 1 else ""
            raise UserError(f"{failures[0]}{more}")


def estimate(cells: Sequence[Cell], lines: Lines) -> float | None:
    """Seconds that runs are going to take, by those that have finished; None: none has.

    A run takes what those of its method and stage have taken an epoch, or what all methods' have.
    """
    rates: dict[tuple[str, str], list[float]] = defaultdict(list)
    for line in lines.values():
        rate = line["wall_seconds"] / line["epochs"]
        for about in ((line["stage"], line["method"]), ("", line["method"]), ("", "")):
            rates[about].append(rate)
    if not rates:
        return None

    def rate_of(cell: Cell) -> float:
        known = ((cell.stage, cell.method), ("", cell.method), ("", ""))
        return fmean(next(rates[about] for about in known if rates.get(about)))

    return sum(rate_of(cell) * cell.epochs for cell in cells)


def in_time(seconds: float | None) -> str:
    """What an estimate comes to, in words."""
    if seconds is None:
        return "how long it takes is not known yet"
    if seconds < 3600:
        return f"about {seconds / 60:.0f} min left"
    return f"about {seconds / 3600:.1f} h left"

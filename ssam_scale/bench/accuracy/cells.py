"""The runs that a study consists of: which are known, in which order, and what the tuning has chosen so far."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from ssam_scale.config.knobs import Knobs, in_words
from ssam_scale.config.study import BASE, SAM, LoadedStudy

REFERENCES = (BASE, SAM)

# Seeds of tuning runs begin here: none of them is a seed that methods are compared by.
_TUNING_SEED = 1000


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        stage: `tune`, on images that are held out of the training set, or `final`, on the validation images.
        method: of the study; empty: a finalist, not known yet.
        knobs: what of it is tuned; None: not known yet, because other runs decide it.
        seed: of all random numbers.
        epochs: how long.
    """

    stage: str
    method: str
    knobs: Knobs | None
    seed: int
    epochs: int

    @property
    def name(self) -> str:
        """In words, unique in a study."""
        knobs = "to be chosen" if self.knobs is None else in_words(self.knobs)
        return f"{self.stage}: {self.method or 'a finalist'}, {knobs}, {self.epochs} epochs, seed {self.seed}"


Lines = Mapping[str, Mapping[str, Any]]
"""What has finished, by key (`Cells.key`)."""


def survivors(scores: Sequence[float]) -> list[int]:
    """Which candidates go on, in their order: the better half, rounded up; of equal ones the first.

    Args:
        scores: of each, higher is better.
    """
    ranked = sorted(range(len(scores)), key=lambda index: (-scores[index], index))
    return sorted(ranked[: -(-len(scores) // 2)])


class Cells:
    """The runs of a study.

    Args:
        loaded: the study.
    """

    def __init__(self, loaded: LoadedStudy) -> None:
        self._loaded, self._study, self._epochs = loaded, loaded.study, loaded.epochs
        self._digests: dict[tuple[str, str], str] = {}

    def key(self, cell: Cell) -> str:
        """Of a known run: the same wherever it is made from the same.

        A line of a study that was changed since then has another key, and does not count.
        """
        assert cell.knobs is not None
        what = cell.method, json.dumps(cell.knobs)
        if what not in self._digests:
            given = json.dumps(self._loaded.given(cell.method, cell.knobs), sort_keys=True)
            self._digests[what] = hashlib.sha256(given.encode()).hexdigest()[:12]
        return f"{cell.name} ({self._digests[what]})"

    def all(self, lines: Lines, seeds: int | None = None) -> list[Cell]:
        """Every run, in the order in which they are done; those with knobs to be chosen among them.

        Base and dense SAM come first, whole: by them a setting is found to be one that tells anything. Then the
        others, rung by rung and seed by seed, so that whatever is there at any time compares all methods.

        Args:
            lines: what has finished.
            seeds: at most so many of each method; None: the study's.
        """
        study = self._study
        found: list[Cell] = []
        others = [name for name in study.methods if name not in REFERENCES]
        for methods in (REFERENCES, others):
            for rung in range(len(study.tuning.rungs)):
                by_method = [self._rung(name, rung, lines) for name in methods]
                found += _in_turns(by_method)
            each = min(study.seeds.each, seeds or study.seeds.each)
            found += self._seeds(methods, range(each), lines)
        if seeds is None or seeds > study.seeds.each:
            last = min(study.seeds.finalists, seeds or study.seeds.finalists)
            finalists = self.finalists(lines)
            known = finalists if finalists is not None else [""] * min(study.seeds.count, len(others))
            found += self._seeds([*REFERENCES, *known], range(study.seeds.each, last), lines)
        return list(self._once(found))

    def chosen(self, method: str, lines: Lines) -> Knobs | None:
        """The knobs that the tuning of a method has chosen; None: it goes on."""
        last = len(self._study.tuning.rungs) - 1
        left = self._candidates(method, last, lines)
        if left is None or not self._study.methods[method].tune:
            return left[0] if left is not None else None
        scores = self._scores(method, last, left, lines)
        if scores is None:
            return None
        return left[max(range(len(left)), key=lambda index: (scores[index], -index))]

    def tuned(self, method: str, lines: Lines) -> list[dict[str, Any]]:
        """What the tuning of a method has seen: each candidate's top-1 by the last rung that it was in."""
        seen: dict[str, dict[str, Any]] = {}
        if not self._study.methods[method].tune:
            return []
        for number in range(len(self._study.tuning.rungs)):
            for knobs in self._candidates(method, number, lines) or ():
                keys = [self.key(cell) for cell in self._runs(method, number, knobs)]
                if tops := [lines[key].get("top1") for key in keys if key in lines]:
                    seen[in_words(knobs)] = {"knobs": dict(knobs), "rung": number, "top1": tops}
        return list(seen.values())

    def finals(self, method: str, lines: Lines) -> dict[int, Mapping[str, Any]]:
        """What the runs of a method with the chosen knobs came to, by seed."""
        knobs = self.chosen(method, lines)
        if knobs is None:
            return {}
        cells = [Cell("final", method, knobs, seed, self._epochs) for seed in range(self._study.seeds.finalists)]
        return {cell.seed: lines[key] for cell in cells if (key := self.key(cell)) in lines}

    def finalists(self, lines: Lines) -> list[str] | None:
        """The methods that are run more often, best first; None: not all have run as often as each does."""
        ranked: list[tuple[float, str]] = []
        seeds = self._study.seeds
        for name in self._study.methods:
            if name in REFERENCES:
                continue
            found = self.finals(name, lines)
            runs = [found[seed] for seed in range(seeds.each) if seed in found]
            if len(runs) < seeds.each:
                return None
            over = [run["overhead"] for run in runs if run.get("overhead") is not None]
            tops = [run["top1"] for run in runs if run.get("top1") is not None]
            if len(tops) == len(runs) and over and fmean(over) <= seeds.within:
                ranked.append((-fmean(tops), name))
        return [name for _, name in sorted(ranked)[: seeds.count]]

    def _rung(self, method: str, number: int, lines: Lines) -> list[list[Cell]]:
        """The runs of a rung, one list a seed."""
        tune = self._study.methods[method].tune
        if not tune:
            return []
        candidates = self._candidates(method, number, lines)
        columns: list[list[Cell]]
        if candidates is not None:
            columns = [self._runs(method, number, knobs) for knobs in candidates]
        else:
            # Runs that an earlier rung has made of whoever gets here are not to come.
            rungs, epochs = self._study.tuning.rungs, self._study.tuning.rungs[number].epochs
            made = max((rung.seeds for rung in rungs[:number] if rung.epochs == epochs), default=0)
            columns = [self._runs(method, number, None)[made:]] * _left(self._study.tuning.candidates, number)
        return [list(row) for row in zip(*columns, strict=True)]

    def _runs(self, method: str, number: int, knobs: Knobs | None) -> list[Cell]:
        """The runs of one candidate in a rung."""
        rung = self._study.tuning.rungs[number]
        epochs = rung.epochs or self._epochs
        return [Cell("tune", method, knobs, _TUNING_SEED + seed, epochs) for seed in range(rung.seeds)]

    def _candidates(self, method: str, number: int, lines: Lines) -> list[Knobs] | None:
        """Those that have got to a rung; None: not known yet."""
        grid = self._study.methods[method].grid
        if not self._study.methods[method].tune:
            return grid
        for earlier in range(number):
            scores = self._scores(method, earlier, grid, lines)
            if scores is None:
                return None
            grid = [grid[index] for index in survivors(scores)]
        return grid

    def _scores(self, method: str, number: int, candidates: Sequence[Knobs], lines: Lines) -> list[float] | None:
        """Mean top-1 of each candidate in a rung, the lowest there is where a run diverged; None: some are to come."""
        found = []
        for knobs in candidates:
            keys = [self.key(cell) for cell in self._runs(method, number, knobs)]
            if any(key not in lines for key in keys):
                return None
            tops = [lines[key].get("top1") for key in keys]
            found.append(-math.inf if None in tops else fmean(top for top in tops if top is not None))
        return found

    def _once(self, cells: Iterable[Cell]) -> Iterator[Cell]:
        """Without repeats: a run that two rungs need is one."""
        seen = set()
        for cell in cells:
            if cell.knobs is None:
                yield cell
            elif (key := self.key(cell)) not in seen:
                seen.add(key)
                yield cell

    def _seeds(self, methods: Sequence[str], seeds: range, lines: Lines) -> list[Cell]:
        chosen = {name: self.chosen(name, lines) if name else None for name in methods}
        return [Cell("final", name, chosen[name], seed, self._epochs) for seed in seeds for name in methods]


def _left(candidates: int, rung: int) -> int:
    """How many get to a rung."""
    for _ in range(rung):
        candidates = -(-candidates // 2)
    return candidates


def _in_turns(by_method: Sequence[Sequence[Sequence[Cell]]]) -> Iterator[Cell]:
    """Seed by seed, and within a seed method by method."""
    for seed in range(max(map(len, by_method), default=0)):
        for rows in by_method:
            if seed < len(rows):
                yield from rows[seed]

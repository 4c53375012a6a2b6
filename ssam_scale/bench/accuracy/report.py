"""What the runs of a study say: the table, whether its setting tells anything, and which plan it recommends.

Everything is computed from the lines of the results; nothing is typed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from ssam_scale.config.knobs import Knobs, in_words
from ssam_scale.config.study import BASE, SAM, LoadedStudy
from ssam_scale.tracking.compare.figures import CostAndGain, Picture, frontier_picture
from ssam_scale.tracking.compare.statistics import Paired, holm, mean_sd, paired

from .cells import REFERENCES, Cells, Lines

SIGNIFICANT = 0.05
"""Of corrected p values: below it, a method differs from dense SAM."""

# A setting counts if dense SAM gains so many of its standard deviations.
_SPREADS = 2.0

Predict = Callable[[str, Knobs], Mapping[str, float | None]]
"""By method and knobs, the predicted time over base on each of some large networks."""


@dataclass(frozen=True)
class Report:
    """What is known so far.

    Attributes:
        rows: one a method, in the study's order; of one without a result, only its name and why.
        counts: whether dense SAM gains enough over base here for anything to be told; None: not known yet.
        recommended: the plan with the highest mean among the cheap ones that are not significantly below dense SAM.
        cheapest: the cheapest of all plans that are not.
        said: sentences on these and on what the numbers are.
        picture: accuracy against overhead; None where nothing is known.
    """

    rows: tuple[dict[str, Any], ...]
    counts: bool | None
    recommended: str | None
    cheapest: str | None
    said: tuple[str, ...]
    picture: Picture | None

    @property
    def points(self) -> list[dict[str, Any]]:
        """The rows with a result."""
        return [row for row in self.rows if row["seeds"]]


def report(loaded: LoadedStudy, lines: Lines, predict: Predict | None = None) -> Report:
    """All that a study's finished runs say.

    Args:
        loaded: the study.
        lines: what has finished.
        predict: gives the overheads of arithmetic; None: they are left out.
    """
    cells = Cells(loaded)
    finals = {name: cells.finals(name, lines) for name in loaded.study.methods}
    rows = [_row(name, cells.chosen(name, lines), finals[name], cells.tuned(name, lines)) for name in finals]
    if predict is not None:
        for row in rows:
            if (knobs := cells.chosen(row["method"], lines)) is not None:
                row["predicted"] = dict(predict(row["method"], knobs))
    _compare(rows, finals)
    counts, said = _counting(rows)
    recommended, cheapest, judged = recommendation(rows, loaded.study.seeds.within)
    said += judged
    said += _caveats(rows, loaded)
    points = [
        CostAndGain(number, row["method"], row["overhead"], row["overhead_interval"], row["top1"], row["top1_sd"])
        for number, row in enumerate(rows)
        if row["overhead"] is not None and row["top1"] is not None
    ]
    picture = frontier_picture(points) if points else None
    return Report(tuple(rows), counts, recommended, cheapest, tuple(said), picture)


def recommendation(rows: Sequence[Mapping[str, Any]], within: float) -> tuple[str | None, str | None, list[str]]:
    """The plan to recommend, the cheapest one, and why.

    The rule: among the plans whose step takes at most `within` times the base optimizer's and that are not
    significantly below dense SAM, the one with the highest mean; beside it, the cheapest of all that are not.

    Args:
        rows: of the table: `method`, `seeds`, `top1`, `overhead`, `over_sam`, `p_holm` and `diverged`.
        within: see above.
    """
    plans = [row for row in rows if row["method"] not in REFERENCES and row["top1"] is not None]
    # A plan some of whose runs diverge is none, whatever the others come to.
    tested = [r for r in plans if r["p_holm"] is not None and r["overhead"] is not None and not r["diverged"]]
    if not tested:
        return None, None, ["Recommended: nothing yet, as no plan has been compared with dense SAM."]
    equal = [row for row in tested if not significantly_below(row)]
    cheap = [row for row in equal if row["overhead"] <= within]
    if not cheap:
        best = max(tested, key=lambda row: (row["overhead"] <= within, row["top1"]))
        why = f"no plan within {within:g} × base is not significantly below dense SAM"
        return None, None, [f"Recommended: none, as {why}. The best within reach is {_in_short(best)}."]
    recommended = max(cheap, key=lambda row: row["top1"])
    cheapest = min(equal, key=lambda row: row["overhead"])
    said = [
        f"Recommended: {_in_short(recommended)}, the highest mean among {len(cheap)} plans within {within:g} × base "
        "that are not significantly below dense SAM.",
        f"The cheapest that is not significantly below dense SAM: {_in_short(cheapest)}.",
    ]
    return recommended["method"], cheapest["method"], said


def tuning(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line of Markdown for each method that was tuned: every candidate, the best first."""
    lines = []
    for row in rows:
        found = []
        for each in row["tuned"]:
            tops = [top1 for top1 in each["top1"] if top1 is not None]
            mean = fmean(tops) if len(tops) == len(each["top1"]) else None
            shown = "diverged" if mean is None else f"{mean:.2f} ({len(tops)})"
            rank = (-each["rung"], math.inf if mean is None else -mean)
            found.append((rank, f"{in_words(tuple(each['knobs'].items()))} {shown}"))
        if found:
            # Of equal ones, the first.
            lines.append(f"- {row['method']}: {', '.join(text for _, text in sorted(found, key=lambda each: each[0]))}")
    return lines


def significantly_below(row: Mapping[str, Any]) -> bool:
    """Whether a method's mean lies below dense SAM's by more than chance, after correction."""
    return row["over_sam"] is not None and row["over_sam"] < 0.0 and (row["p_holm"] or 0.0) < SIGNIFICANT


def _row(
    method: str, knobs: Knobs | None, runs: Mapping[int, Mapping[str, Any]], tuned: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    tops = {seed: run["top1"] for seed, run in sorted(runs.items()) if run.get("top1") is not None}
    top1, sd = mean_sd(list(tops.values()))
    low, high = (_mean_of_all(runs, f"overhead_{bound}") for bound in ("low", "high"))
    return {
        "method": method,
        "knobs": None if knobs is None else dict(knobs),
        "knobs_in_words": "not tuned yet" if knobs is None else in_words(knobs),
        "seeds": len(tops),
        "diverged": len(runs) - len(tops),
        "top1": top1,
        "top1_sd": sd,
        "overhead": _mean_of_all(runs, "overhead"),
        "overhead_interval": None if low is None or high is None else (low, high),
        "seconds": _mean_of_all(runs, "seconds"),
        "predicted": {},
        "over_sam": None,
        "over_sam_interval": None,
        "p": None,
        "p_holm": None,
        "pairs": 0,
        "top1_by_seed": {str(seed): value for seed, value in tops.items()},
        "run_ids": [run["run_id"] for _, run in sorted(runs.items()) if run.get("run_id")],
        "commits": sorted({run["commit"] for run in runs.values() if "commit" in run}),
        "hardware": sorted({run["hardware"] for run in runs.values() if "hardware" in run}),
        "tuned": list(tuned),
    }


def _mean_of_all(runs: Mapping[int, Mapping[str, Any]], key: str) -> float | None:
    """Over the runs that came to an end; None where one of them does not know it."""
    values = [run.get(key) for run in runs.values() if run.get("top1") is not None]
    known = [value for value in values if value is not None]
    return fmean(known) if known and len(known) == len(values) else None


def _compare(rows: Sequence[dict[str, Any]], finals: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> None:
    """Put each row's difference to dense SAM into it, by the seeds that both have, and its corrected p value."""
    theirs = {seed: run["top1"] for seed, run in finals[SAM].items() if run.get("top1") is not None}
    tested = []
    for row in rows:
        mine = {seed: run["top1"] for seed, run in finals[row["method"]].items() if run.get("top1") is not None}
        seeds = sorted(mine.keys() & theirs.keys())
        if row["method"] == SAM or not seeds:
            continue
        found: Paired = paired([mine[seed] for seed in seeds], [theirs[seed] for seed in seeds])
        row |= {"over_sam": found.mean, "p": found.p, "pairs": len(seeds)}
        if found.low is not None and found.high is not None:
            row["over_sam_interval"] = (found.low, found.high)
        if found.p is not None:
            tested.append(row)
    for row, p in zip(tested, holm([row["p"] for row in tested]), strict=True):
        row["p_holm"] = p


def _counting(rows: Sequence[Mapping[str, Any]]) -> tuple[bool | None, list[str]]:
    by_name = {row["method"]: row for row in rows}
    base, sam = by_name[BASE], by_name[SAM]
    if base["top1"] is None or sam["top1_sd"] is None:
        return None, ["Whether the setting counts is not known yet: base and dense SAM are to be run with some seeds."]
    gain, needed = sam["top1"] - base["top1"], _SPREADS * sam["top1_sd"]
    counts = gain >= needed
    verdict = "counts" if counts else "does not count"
    at_least = "at least" if counts else "less than"
    return counts, [
        f"The setting {verdict}: dense SAM gains {gain:+.2f} over base, which is {at_least} {_SPREADS:g} times its "
        f"standard deviation over {sam['seeds']} seeds ({needed:.2f})."
    ]


def _caveats(rows: Sequence[Mapping[str, Any]], loaded: LoadedStudy) -> list[str]:
    said = []
    fewest = min((row["seeds"] for row in rows if row["seeds"]), default=0)
    if 0 < fewest < 5:
        said.append(f"A trial: some methods have {fewest} seeds only, by which little is significant.")
    missing = [row["method"] for row in rows if not row["seeds"]]
    if missing:
        said.append(f"Without a result so far: {', '.join(missing)}.")
    diverged = [f"{row['method']} ({row['diverged']})" for row in rows if row["diverged"]]
    if diverged:
        said.append(f"Runs whose loss became infinite, left out of the means: {', '.join(diverged)}.")
    for what in ("commits", "hardware"):
        found = sorted({each for row in rows for each in row[what]})
        if len(found) > 1:
            said.append(f"Of several {what}: {', '.join(found)}.")
    return said


def _in_short(row: Mapping[str, Any]) -> str:
    sd = "" if row["top1_sd"] is None else f" ± {row['top1_sd']:.2f}"
    return f"{row['method']} ({row['knobs_in_words']}; {row['top1']:.2f}{sd}, {row['overhead']:.3f} × base)"

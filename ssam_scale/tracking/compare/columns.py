"""What a comparison shows of its rows, how it is written and how it was measured: for terminal and page alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ssam_scale.tracking.compare.rows import Comparison, Row


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        title: with the unit.
        keys: attributes of `Row` that it shows; notes on any of them belong to it.
        cell: what is shown of a row, a dash for what is not known.
        how: how it was measured, a sentence for people; empty where nothing was.
        words: whether cells are words rather than numbers.
    """

    title: str
    keys: tuple[str, ...]
    cell: Callable[[Row], str]
    how: str = ""
    words: bool = False

    def notes(self, row: Row) -> list[str]:
        """What there is to know about the cell of a row."""
        return [row.notes[key] for key in self.keys if key in row.notes]


def columns(comparison: Comparison) -> list[Column]:
    """All that tell something of this comparison; what is the same in all rows, or known of none, needs no column."""
    rows = comparison.rows
    price, accuracy, wall_clock = comparison.question.price, comparison.accuracy, comparison.wall_clock
    several = {
        "model": len({row.model for row in rows}) > 1,
        "backend": len({row.backend for row in rows}) > 1,
        "settings": any(row.settings for row in rows),
        "density": any(row.density is not None for row in rows),
        "cost": price is not None,
        "seconds_to_accuracy": accuracy is not None,
        "top1_at_wall_clock": wall_clock is not None,
        **{
            key: any(getattr(row, key) is not None for row in rows)
            for key in ("seconds", "images_per_second", "gpu_hours", "gain_over_base", "gain_over_sam")
        },
    }
    family = f"Welch's t test of top-1, two-sided, with Holm's correction over {_count(comparison.tests, 'comparison')}"
    probes = (
        "By probes: steps of the base optimizer, of dense SAM and of the run itself, timed side by side in the run, "
        "with the means over the seeds of 95% bootstrap intervals. Where not all runs have probes, between runs"
    )
    made = [
        Column("method", ("method",), lambda row: row.method + (" (running)" if row.running else ""), words=True),
        Column("model", ("model",), lambda row: row.model, words=True),
        Column("backend", ("backend",), lambda row: row.backend, words=True),
        Column("mask", ("mask",), lambda row: row.mask or "—", words=True),
        Column("settings", ("settings",), lambda row: row.settings or "—", words=True),
        Column(
            "density",
            ("density",),
            lambda row: _shown(row.density, lambda value: f"{100 * value:.0f}%"),
            "The share of the weights that is perturbed, mean over the steps.",
        ),
        Column("runs", ("runs",), lambda row: str(row.runs), "Seeds; of several runs of a seed the latest counts."),
        Column(
            "top-1 %",
            ("top1",),
            lambda row: _spread(row.top1, row.top1_sd, ".2f"),
            "After the last epoch, of the averaged weights where there are any: mean ± sample standard deviation over "
            "the seeds.",
        ),
        Column(
            "gain / base",
            ("gain_over_base", "p_over_base"),
            lambda row: _gain(row.gain_over_base, row.p_over_base),
            f"Percentage points of top-1 over the base optimizer. p: {family}.",
        ),
        Column(
            "gain / SAM",
            ("gain_over_sam", "p_over_sam"),
            lambda row: _gain(row.gain_over_sam, row.p_over_sam),
            "The same over dense SAM, in the same family of comparisons.",
        ),
        Column(
            "seconds",
            ("seconds",),
            lambda row: _spread(row.seconds, row.seconds_sd, ",.0f"),
            "Wall-clock of training: the sum of the epochs' times, refreshes and waiting for data included, without "
            "probes, evaluations and checkpoints.",
        ),
        Column(
            "images/s",
            ("images_per_second",),
            lambda row: _spread(row.images_per_second, row.images_per_second_sd, ",.0f"),
            "All images over the seconds of all steps.",
        ),
        Column(
            "step ms",
            ("step_seconds",),
            lambda row: _shown(row.step_seconds, lambda value: f"{1000 * value:.1f}"),
            "Mean of the step times without the first and the fastest and slowest tenth, with each step's share of "
            "the mask refreshes.",
        ),
        Column(
            "time / base",
            ("time_over_base",),
            lambda row: (
                _shown(row.time_over_base, "{:.2f}".format) + _bounds(row.time_over_base_interval, "{:.2f}".format)
            ),
            f"1 + the overhead over the base optimizer alone. {probes}: step time over the base run's.",
        ),
        Column(
            "saving over SAM",
            ("saving_over_sam",),
            lambda row: _shown(row.saving_over_sam, _percent) + _bounds(row.saving_interval, _percent),
            f"The share of dense SAM's time that is not taken. {probes}: 1 − step time / dense SAM's.",
        ),
        Column(
            "GPU-hours",
            ("gpu_hours",),
            lambda row: _spread(row.gpu_hours, row.gpu_hours_sd, _three_digits(row.gpu_hours)),
            "Seconds of training times GPUs.",
        ),
        Column(
            "cost",
            ("cost",),
            lambda row: _spread(row.cost, row.cost_sd, ",.2f"),
            f"GPU-hours times the price of {price:g} that was given for one." if price is not None else "",
        ),
    ]
    if accuracy is not None:
        made.append(
            Column(
                f"s to {accuracy:.2f}%",
                ("seconds_to_accuracy",),
                lambda row: _spread(row.seconds_to_accuracy, row.seconds_to_accuracy_sd, ",.0f"),
                "Seconds of training until the first evaluation with at least this top-1"
                + ("." if comparison.question.accuracy is not None else ", the best that every run reaches."),
            )
        )
    if wall_clock is not None:
        made.append(
            Column(
                f"top-1 at {wall_clock:,.0f} s",
                ("top1_at_wall_clock",),
                lambda row: _spread(row.top1_at_wall_clock, row.top1_at_wall_clock_sd, ".2f"),
                "Accuracy at equal wall-clock: the last evaluation within so many seconds of training"
                + ("" if comparison.question.wall_clock is not None else ", those of the fastest method")
                + ". A run whose learning rate was to fall for longer is not at its best by then.",
            )
        )
    return [column for column in made if several.get(column.keys[0], True)]


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s'[: number != 1]}"


def _shown(value: float | None, form: Callable[[float], str]) -> str:
    return "—" if value is None else form(value).replace("-", "−")


def _spread(mean: float | None, sd: float | None, form: str) -> str:
    return _shown(mean, lambda value: format(value, form)) + ("" if sd is None else f" ± {format(sd, form)}")


def _percent(value: float) -> str:
    return f"{round(100 * value)}%"  # an integer has no −0


def _three_digits(value: float | None) -> str:
    """A format that shows about three digits of a number, and as many decimals of its deviation."""
    return f",.{max(0, 2 - math.floor(math.log10(value)))}f" if value else ".0f"


def _bounds(interval: Sequence[float] | None, form: Callable[[float], str]) -> str:
    return "" if interval is None else " ({} to {})".format(*(_shown(bound, form) for bound in interval))


def _gain(gain: float | None, p: float | None) -> str:
    return _shown(gain, "{:+.2f}".format) + ("" if p is None else f" (p {_p(p)})")


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}" if value < 0.1 else f"{value:.2f}"

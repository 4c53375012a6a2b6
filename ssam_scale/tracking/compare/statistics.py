"""What is computed of several runs: means, tests, how long an accuracy takes, and what is worth its time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import fmean, stdev
from typing import NamedTuple


class Evaluation(NamedTuple):
    """One of a run's evaluations.

    Attributes:
        seconds: of training until then.
        epoch: epochs done.
        top1: accuracy, percent.
    """

    seconds: float
    epoch: float
    top1: float


Curve = Sequence[Evaluation]


def mean_sd(values: Sequence[float]) -> tuple[float | None, float | None]:
    """The mean, None of nothing; and the sample standard deviation, None of fewer than two."""
    return (fmean(values) if values else None), (stdev(values) if len(values) > 1 else None)


def welch(first: Sequence[float], second: Sequence[float]) -> float | None:
    """p of Welch's t test, two-sided: how often means of one distribution would differ by as much or more.

    Args:
        first: at least two values.
        second: the same.

    Returns:
        None where neither side varies, which leaves nothing to compare a difference with.
    """
    from scipy.stats import ttest_ind_from_stats

    # By deviations of Python's own, which are exact; scipy's of values that are nearly the same warns of rounding.
    sides = [(fmean(side), stdev(side), len(side)) for side in (first, second)]
    if not any(sd for _, sd, _ in sides):
        return None
    p = float(ttest_ind_from_stats(*sides[0], *sides[1], equal_var=False).pvalue)
    return None if math.isnan(p) else p


class Paired(NamedTuple):
    """How two sides differ that were measured in pairs, such as with the same seeds.

    Attributes:
        mean: of the differences.
        low: of its 95% interval; None of a single pair, or where the differences do not vary.
        high: the same.
        p: of the paired t test, two-sided; None likewise.
    """

    mean: float
    low: float | None
    high: float | None
    p: float | None


def paired(first: Sequence[float], second: Sequence[float]) -> Paired:
    """The mean of first − second, pair by pair, with its interval and test by Student's t.

    Args:
        first: at least one value.
        second: as many, in the same order.
    """
    from scipy.stats import t

    # Percentages of thousands of images: what is smaller comes of subtracting, and would be all that varies.
    differences = [round(one - other, 9) for one, other in zip(first, second, strict=True)]
    mean = fmean(differences)
    if len(set(differences)) < 2:
        return Paired(mean, None, None, None)
    error = stdev(differences) / math.sqrt(len(differences))
    freedom = len(differences) - 1
    half = float(t.ppf(0.975, freedom)) * error
    return Paired(mean, mean - half, mean + half, float(2.0 * t.sf(abs(mean) / error, freedom)))


def holm(p_values: Sequence[float]) -> list[float]:
    """p values of a family of tests, corrected by Holm's step-down method, in the order given.

    To reject where the corrected value is at most α rejects a true hypothesis of the family with a probability of at
    most α, however the tests depend on each other (Holm, Scandinavian Journal of Statistics 6, 1979).
    """
    corrected = [0.0] * len(p_values)
    least = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = least
    return corrected


def seconds_to(curve: Curve, accuracy: float) -> float | None:
    """Seconds of training until the first evaluation with at least this top-1; None if there is none."""
    return min((each.seconds for each in curve if each.top1 >= accuracy), default=None)


def top1_at(curve: Curve, seconds: float) -> float | None:
    """top-1 of the last evaluation within so many seconds of training; None if there is none yet."""
    within = [each for each in curve if each.seconds <= seconds]
    return max(within, key=lambda each: each.seconds).top1 if within else None


def reached_by_all(curves: Iterable[Curve]) -> float | None:
    """The best top-1 that each of the curves reaches; None of no curve."""
    return min((max(each.top1 for each in curve) for curve in curves if curve), default=None)


def fastest(methods: Iterable[Sequence[Curve]]) -> float | None:
    """Seconds of the method that is trained in the shortest time on average: of its slowest run, so all have ended.

    Args:
        methods: curves of the runs of each; those without an evaluation do not count.
    """
    ends = [[curve[-1].seconds for curve in curves if curve] for curves in methods]
    return max(min((each for each in ends if each), key=fmean, default=[]), default=None)


def frontier(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which of the points (cost, gain) no other is as good as in both and better in one; the cheapest first."""

    def beaten(cost: float, gain: float) -> bool:
        return any(c <= cost and g >= gain and (c, g) != (cost, gain) for c, g in points)

    return sorted((i for i, point in enumerate(points) if not beaten(*point)), key=lambda i: points[i])

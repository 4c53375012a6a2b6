"""What a run has saved over dense SAM and costs over its base optimizer, measured inside the run itself.

A probe times the passes of three steps side by side, on the same batch: the base optimizer's, dense SAM's and the run's
own. Other work on the machine slows all three down alike, so that their ratios stay what they are on a quiet machine,
as ratios between runs at different times do not. What the three have in common (the base optimizer's step, the wait for
data) is added from the steps of training, and how often an ascent comes is counted there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ssam_scale.perturbation import StepKind

from .timer import PhaseSummary

T = TypeVar("T")

FEWEST = 3
"""Probes below which no interval is given: their spread says nothing yet."""


@dataclass(frozen=True)
class Probe:
    """Seconds of the passes of three steps on one batch.

    Attributes:
        base: of the base optimizer's.
        dense: of dense SAM's.
        own: of the run's own, with an ascent.
        reference: of what a trajectory term computes before every step, beside them.
    """

    base: float
    dense: float
    own: float
    reference: float = 0.0


class Saving:
    """Collects probes and the steps of a run, and says what was saved.

    Args:
        method: the run's: `base` costs nothing over itself.
        dense: whether the run's own ascents are dense SAM's, which save nothing.
        gpus: that the run computes on; 0: on none.

    Attributes:
        before: seconds that the run had saved before it was resumed.
        refreshes: seconds that choosing masks has taken, which dense SAM does not do.
    """

    def __init__(self, method: str, *, dense: bool = False, gpus: int = 0) -> None:
        self._method, self._dense, self._gpus = method, dense, gpus
        self.before = self.refreshes = 0.0
        self._probes: list[Probe] = []
        self._steps: dict[StepKind, int] = {}
        self._rest = self._data = 0.0
        self._bounded = 0  # probes that the last interval was of

    def add(self, probe: Probe) -> None:
        """Take one probe in."""
        self._probes.append(probe)

    def count(self, summary: PhaseSummary) -> None:
        """Take in the steps of a window of training."""
        for kind, of_kind in summary.by_kind.items():
            self._steps[kind] = self._steps.get(kind, 0) + of_kind.steps
        self._rest += summary.phases.get("optimizer", 0.0) * summary.steps
        self._data += summary.phases.get("data", 0.0) * summary.steps

    @property
    def interval_is_due(self) -> bool:
        """Whether there are enough more probes since the last interval, each of which takes longer: one in twenty."""
        return 20 * len(self._probes) >= 21 * self._bounded

    def metrics(self, *, intervals: bool = True) -> dict[str, float]:
        """What is known by now, under the names that it has in MLflow; empty before there are a probe and steps.

        Intervals take some milliseconds, and of 1,000 probes 0.2 s.

        `saving/vs_dense_percent`: of the time that the run's steps would have taken as dense SAM's; below 0 where they
        took longer, as a mask that is chosen anew can make them.
        `overhead/vs_base_percent`: on top of what they would have taken as the base optimizer's. Both with a 95%
        interval (`_low`, `_high`), by bootstrap over the probes, from `FEWEST` of them on.
        `saving/seconds_so_far`, and `saving/gpu_hours_so_far` on GPUs.
        """
        steps = sum(self._steps.values())
        if self._method == "base" and steps:
            return {"overhead/vs_base_percent": 0.0}
        if not self._probes or not steps:
            return {}
        times = np.array([(p.base, p.dense, p.own, p.reference) for p in self._probes]).T
        saved, saving, overhead = self._figures(*times)
        result = {
            "saving/vs_dense_percent": float(saving),
            "saving/seconds_so_far": self.before + float(saved) * steps,
            "overhead/vs_base_percent": float(overhead),
        }
        if self._gpus:
            result["saving/gpu_hours_so_far"] = result["saving/seconds_so_far"] * self._gpus / 3600.0
        if intervals and len(self._probes) >= FEWEST:
            self._bounded = len(self._probes)
            for key, index in (("saving/vs_dense_percent", 1), ("overhead/vs_base_percent", 2)):
                low, high = _interval(times, lambda *resampled, index=index: self._figures(*resampled)[index])
                result |= {f"{key}_low": low, f"{key}_high": high}
        return result

    def _figures(self, base: Any, dense: Any, own: Any, reference: Any) -> tuple[Any, Any, Any]:
        """Seconds saved a step, share of them in dense SAM's and overhead over the base's in percent.

        Args:
            base: seconds of probes, of shape [..., probes].
            dense: the same.
            own: the same.
            reference: the same.
        """
        base, dense, own, reference = (np.mean(times, axis=-1) for times in (base, dense, own, reference))
        if self._dense:
            own = dense
        steps = sum(self._steps.values())
        of_kind: Mapping[StepKind, Any] = {
            "base": base,
            "reused": base,
            "sparse": own,
            "free": own,
            "dense": own,
            "calibrating": dense,
        }
        passes = reference + sum(count / steps * of_kind[kind] for kind, count in self._steps.items())
        rest, data, refreshes = self._rest / steps, self._data / steps, self.refreshes / steps
        saved = dense - passes - refreshes
        # While a step of dense SAM computes longer, the loader works on: what it was waited for is no saving then.
        saved = saved - np.minimum(np.maximum(saved, 0.0), data)
        mine = passes + refreshes + rest + data
        return saved, 100.0 * saved / (mine + saved), 100.0 * (mine / (base + rest + data) - 1.0)


def _interval(times: NDArray[np.float64], figure: Any) -> tuple[float, float]:
    """95% of a figure of probes, by bootstrap over them.

    Args:
        times: seconds, [4, probes].
        figure: of four arrays whose last dimension is that of the probes.
    """
    from scipy.stats import bootstrap

    found = bootstrap(
        tuple(times),
        lambda base, dense, own, reference, axis=-1: figure(base, dense, own, reference),
        paired=True,
        vectorized=True,
        n_resamples=999,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(found.low), float(found.high)


def order_of(seed: int, step: int, names: Sequence[T]) -> list[T]:
    """A random order of what a probe times, the same on every process."""
    return [names[i] for i in np.random.default_rng((seed, step)).permutation(len(names))]

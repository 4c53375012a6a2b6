"""AE-SAM's gate: an ascent only where the gradient is unusually long (arXiv 2304.14647)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import NormalDist, fmean
from typing import Any

import torch
from torch import Tensor

from ssam_scale.checks import check_number


@dataclass(frozen=True)
class Gate:
    """A step perturbs if ‖g‖² ≥ μ + c σ, and else goes by g, its plain gradient: one pass instead of two.

    μ and σ² are running mean and variance of ‖g‖², μ ← δ μ + (1 − δ) ‖g‖² and σ² ← δ σ² + (1 − δ) (‖g‖² − μ)²,
    beginning as the first ‖g‖² and 0; c moves along a line over the run (equations 4 to 6 of the paper, whose λ2 is
    `first` and λ1 `last`). g is the gradient of every weight on the whole batch, so nothing of a first pass is left
    out, whatever the mask. The host waits for the device once a step, to know which it is.

    Attributes:
        steps: optimizer steps of the run.
        delta: δ in [0, 1).
        first: c at the first step.
        last: c at the last one.

    Raises:
        TypeError, ValueError: something is of another kind or out of its range.
    """

    steps: int
    delta: float = 0.9
    first: float = 1.0
    last: float = -1.0

    def __post_init__(self) -> None:
        check_number("steps", self.steps, "at least 1", lambda steps: steps >= 1, whole=True)
        check_number("delta", self.delta, "a share of at least 0 and below 1", lambda share: 0.0 <= share < 1.0)
        for name in ("first", "last"):
            check_number(name, getattr(self, name), "a finite number", math.isfinite)

    def threshold(self, step: int) -> float:
        """c at step number `step`, from 0."""
        return self.first + (self.last - self.first) * min(step / self.steps, 1.0)

    @property
    def expected_share(self) -> float:
        """Of the steps, how many perturb if ‖g‖² is normally distributed and changes slowly."""
        return fmean(1.0 - NormalDist().cdf(self.first + (self.last - self.first) * i / 100) for i in range(101))


class GateState:
    """Mean and variance of ‖g‖², the same on every process.

    Args:
        gate: what decides by them.

    Attributes:
        opened: whether the last step perturbed.
    """

    def __init__(self, gate: Gate) -> None:
        self.gate, self.opened = gate, True
        self._mean, self._variance = math.nan, 0.0

    def opens(self, squared: float, step: int) -> bool:
        """Whether a step perturbs whose plain gradient has this ‖g‖²; one that is not finite does not, nor counts."""
        if not math.isfinite(squared):
            self.opened = False
            return False
        delta = self.gate.delta
        self._mean = squared if math.isnan(self._mean) else delta * self._mean + (1.0 - delta) * squared
        self._variance = delta * self._variance + (1.0 - delta) * (squared - self._mean) ** 2
        self.opened = squared >= self._mean + self.gate.threshold(step) * math.sqrt(self._variance)
        return self.opened

    def snapshot(self) -> Callable[[], None]:
        """What puts mean and variance back to what they are now."""
        before = self._mean, self._variance

        def restore() -> None:
            self._mean, self._variance = before

        return restore

    def state_dict(self) -> dict[str, Tensor]:
        """`gate`: mean, not a number before the first step, and variance of ‖g‖², float64 of shape (2,)."""
        return {"gate": torch.tensor([self._mean, self._variance], dtype=torch.float64)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned; without it the next step begins anew."""
        if "gate" in state:
            self._mean, self._variance = state["gate"].tolist()

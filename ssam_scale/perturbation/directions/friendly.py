"""A fresh gradient less the running mean of earlier ones (F-SAM, arXiv 2403.12350)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ssam_scale.checks import check_number
from ssam_scale.config.direction_sections import FriendlyDirection
from ssam_scale.masks import Plan
from ssam_scale.perturbation.arithmetic import zero_unless_
from ssam_scale.sharding import Sharding
from ssam_scale.sharding.chunks import Chunk

from .interface import DIRECTIONS, Ascending, Forgetful, Gradients, unscaled
from .kept import Kept, begins_without


@dataclass(frozen=True)
class Friendly(Ascending):
    """ε along g − σ m, m the running mean of the gradients at earlier w: what is special to this batch (F-SAM).

    d = g − σ m, then m ← λ m + (1 − λ) g; the first step goes along g, which m begins as (section 4.3 and the authors'
    code, whose names these are). With a mask all of this is about the perturbed weights, of which m takes 4 bytes each.
    A step whose gradient is not finite leaves m alone.

    Attributes:
        sigma: σ ≥ 0, how much of the mean is taken off.
        lmbda: λ in [0, 1], the share of the old mean in the new one.
    """

    sigma: float = 1.0
    lmbda: float = 0.9

    whole = False
    norms = frozenset({"masked"})
    remembers = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("sigma", self.sigma, "a factor of at least 0", lambda factor: 0.0 <= factor < math.inf)
        check_number("lmbda", self.lmbda, "a share in [0, 1]", lambda share: 0.0 <= share <= 1.0)

    def source(
        self, sharding: Sharding, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> FriendlyGradient:
        """See `Direction`."""
        return FriendlyGradient(self, sharding, parameters)


class FriendlyGradient(Forgetful):
    """g − σ m."""

    def __init__(self, direction: Friendly, sharding: Sharding, parameters: Mapping[str, nn.Parameter]) -> None:
        self._direction, self._mean = direction, Kept(sharding, parameters)
        self._seen: tuple[Plan, list[Tensor], list[Tensor], list[Tensor | None], Tensor | float] | None = None

    def vectors(self, plan: Plan, gradients: Gradients, scale: Tensor | float = 1.0) -> list[Tensor]:
        """Of the perturbed weights alone."""
        fresh = unscaled(plan, gradients, scale)
        mean, unknown = self._mean.of(plan)
        self._seen = plan, fresh, mean, unknown, scale
        if not mean:
            return []
        special = list(torch._foreach_mul(mean, -self._direction.sigma))
        torch._foreach_add_(special, fresh)
        return special

    def learn(self, exists: Tensor | None) -> None:
        """m ← λ m + (1 − λ) g."""
        if exists is None or self._seen is None:
            self._seen = None
            return
        (plan, fresh, mean, unknown, scale), self._seen = self._seen, None
        if not mean or begins_without(exists, unknown, scale):
            return
        zero_unless_(fresh, exists)
        share = 1.0 - self._direction.lmbda
        torch._foreach_mul_(mean, torch.where(exists, 1.0 - share, 1.0))
        torch._foreach_add_(mean, fresh, alpha=share)
        for m, g, first in zip(mean, fresh, unknown, strict=True):
            if first is not None:
                m.copy_(torch.where(first, g, m))
        self._mean.keep(plan, mean)

    def take_over(self, before: Any) -> None:
        """With what it has kept."""
        self._mean.take_over(before._mean)

    def state_dict(self) -> dict[str, dict[str, Tensor | Chunk]]:
        """`friendly_mean`: m by parameter; not a number where there is none."""
        return {"friendly_mean": self._mean.state_dict()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take back what `state_dict` returned; without it the next step begins anew."""
        self._mean.load_state_dict(state.get("friendly_mean", {}))


@DIRECTIONS.register("friendly", "a fresh gradient less the running mean of earlier ones (F-SAM)", "arXiv 2403.12350")
def build(section: FriendlyDirection) -> Friendly:
    """The direction of the section `perturbation.direction`."""
    return Friendly(section.fraction, section.choose, section.sigma, section.lmbda)

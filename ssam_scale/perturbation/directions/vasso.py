"""The running mean of fresh gradients (VaSSO, arXiv 2309.15639)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ssam_scale.checks import check_number
from ssam_scale.config.direction_sections import VaSSODirection
from ssam_scale.masks import Plan
from ssam_scale.perturbation.arithmetic import zero_unless_
from ssam_scale.sharding import Sharding
from ssam_scale.sharding.chunks import Chunk

from .interface import DIRECTIONS, Ascending, Forgetful, Gradients, unscaled
from .kept import Kept, begins_without


@dataclass(frozen=True)
class VaSSO(Ascending):
    """ε along d, the running mean of the gradients at w: less variance than one batch has (VaSSO).

    d ← (1 − θ) d + θ g, beginning as g (equation 6 and the authors' code). With a mask all of this is about the
    perturbed weights, of which d takes 4 bytes each. A step whose gradient is not finite leaves d alone.

    Attributes:
        theta: θ in (0, 1], the share of the fresh gradient; 1 is SAM.
    """

    theta: float = 0.9

    whole = False
    norms = frozenset({"masked"})
    remembers = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("theta", self.theta, "a share in (0, 1]", lambda share: 0.0 < share <= 1.0)

    def source(
        self, sharding: Sharding, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> MeanGradient:
        """See `Direction`."""
        return MeanGradient(self, sharding, parameters)


class MeanGradient(Forgetful):
    """d."""

    def __init__(self, direction: VaSSO, sharding: Sharding, parameters: Mapping[str, nn.Parameter]) -> None:
        self._direction, self._mean = direction, Kept(sharding, parameters)
        self._seen: tuple[Plan, list[Tensor], list[Tensor], list[Tensor | None], Tensor | float] | None = None

    def vectors(self, plan: Plan, gradients: Gradients, scale: Tensor | float = 1.0) -> list[Tensor]:
        """Of the perturbed weights alone."""
        moved = unscaled(plan, gradients, scale)
        mean, unknown = self._mean.of(plan)
        begun = [None if first is None else torch.where(first, g, 0.0) for g, first in zip(moved, unknown, strict=True)]
        if moved:
            torch._foreach_mul_(moved, self._direction.theta)
            torch._foreach_add_(moved, mean, alpha=1.0 - self._direction.theta)
        for d, g, first in zip(moved, begun, unknown, strict=True):
            if first is not None and g is not None:
                d.copy_(torch.where(first, g, d))
        self._seen = plan, moved, mean, unknown, scale
        return moved

    def learn(self, exists: Tensor | None) -> None:
        """Keep d if it is finite, and else what it was."""
        if exists is None or self._seen is None:
            self._seen = None
            return
        (plan, moved, mean, unknown, scale), self._seen = self._seen, None
        if mean and not begins_without(exists, unknown, scale):
            zero_unless_(moved, exists)
            zero_unless_(mean, ~exists)
            torch._foreach_add_(mean, moved)
            self._mean.keep(plan, mean)

    def take_over(self, before: Any) -> None:
        """With what it has kept."""
        self._mean.take_over(before._mean)

    def state_dict(self) -> dict[str, dict[str, Tensor | Chunk]]:
        """`mean_direction`: d by parameter; not a number where there is none."""
        return {"mean_direction": self._mean.state_dict()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take back what `state_dict` returned; without it the next step begins anew."""
        self._mean.load_state_dict(state.get("mean_direction", {}))


@DIRECTIONS.register("vasso", "the running mean of fresh gradients (VaSSO)", "arXiv 2309.15639")
def build(section: VaSSODirection) -> VaSSO:
    """The direction of the section `perturbation.direction`."""
    return VaSSO(section.fraction, section.choose, section.theta)

"""The descent gradient of the step before (S2-SAM; AsyncSAM with a delay of one step)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ssam_scale.config.direction_sections import PreviousDirection
from ssam_scale.masks import Plan, masked_select
from ssam_scale.perturbation.arithmetic import at_least_fp32, squares, zero_unless_
from ssam_scale.sharding import Sharding
from ssam_scale.sharding.chunks import Chunk

from .interface import DIRECTIONS, Forgetful, Gradients
from .kept import Kept


@dataclass(frozen=True)
class Previous:
    """ε along the gradient that the step before descended by: no ascent pass, at the price of one step's delay.

    S2-SAM (openreview MJgMMqMDu4) with its gradient at w + ε; AsyncSAM (arXiv 2503.11147) takes that at w, which costs
    a pass. The first step is the base optimizer's. Of the gradient what the next step perturbs is kept, 4 bytes a
    weight; weights that a refresh of the mask brings in between are perturbed a step later.
    """

    ascends = False
    whole = False
    norms = frozenset({"masked"})
    remembers = True

    def check(self, optimizer: torch.optim.Optimizer) -> None:
        """Any will do."""

    def source(
        self, sharding: Sharding, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> PreviousGradient:
        """See `Direction`."""
        return PreviousGradient(sharding, parameters)


class PreviousGradient(Forgetful):
    """The gradient at the last w + ε."""

    looks_back = True

    def __init__(self, sharding: Sharding, parameters: Mapping[str, nn.Parameter]) -> None:
        self._sharding, self._parameters = sharding, parameters
        self._gradient = Kept(sharding, parameters)

    @property
    def ready(self) -> bool:
        """After the first step."""
        return bool(self._gradient)

    def vectors(self, plan: Plan, gradients: Gradients, scale: Tensor | float = 1.0) -> list[Tensor]:
        """What is kept."""
        return self._gradient.of(plan)[0]

    @torch.no_grad()
    def after_descent(self, following: Plan) -> None:
        """Keep of the gradient what the next step perturbs."""
        chosen = self._sharding.gradients([self._parameters[name] for name in following.weights])
        kept = at_least_fp32(masked_select(chosen, list(following.weights.values())))
        if kept:
            # One that is not finite is no direction, and none is kept: the next step has no perturbation.
            length = self._sharding.shard_group.all_reduce(squares(kept, kept[0].device).sum())
            zero_unless_(kept, length.isfinite())
        self._gradient.replace(following, kept)

    def take_over(self, before: Any) -> None:
        """With what it has kept."""
        self._gradient.take_over(before._gradient)

    def state_dict(self) -> dict[str, dict[str, Tensor | Chunk]]:
        """`previous_gradient`: by parameter; not a number where nothing is kept."""
        return {"previous_gradient": self._gradient.state_dict()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take back what `state_dict` returned; without it the next step is the base optimizer's."""
        self._gradient.load_state_dict(state.get("previous_gradient", {}))


@DIRECTIONS.register("previous", "the descent gradient of the step before; no ascent pass", "openreview MJgMMqMDu4")
def build(section: PreviousDirection) -> Previous:
    """The direction of the section `perturbation.direction`."""
    return Previous()

"""The gradient at w of this step's batch, or of a part of it (SAM, arXiv 2010.01412)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor, nn

from ssam_scale.checks import check_choice
from ssam_scale.config.direction_sections import FreshDirection, Scope
from ssam_scale.masks import Plan
from ssam_scale.sharding import Sharding

from .interface import DIRECTIONS, Ascending, Direction, Forgetful, Gradients


@dataclass(frozen=True)
class Fresh(Ascending):
    """ε along the gradient at w, by an ascent pass of its own: SAM as it was published. See also `Ascending`.

    Attributes:
        scope: whose samples one ascent is by (m-sharpness): all of a step's (`global`); those of a shard group, the
            processes that one copy of the weights is spread over (`shard_group`, FSDP2 with replicas); of one process
            (`worker`, as Foret et al. and the authors of GSAM have it; where each process holds all weights); or of one
            micro-batch of a shard group (`micro_batch`), each of which climbs, descends and is put back by itself.
    """

    scope: Scope = "global"

    whole = True
    norms = frozenset({"dense", "masked", "calibrated"})
    remembers = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("scope", self.scope, get_args(Scope))

    def source(
        self, sharding: Sharding, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> FreshGradient:
        """See `Direction`."""
        return FreshGradient()


def scope_of(direction: Direction) -> Scope:
    """Whose samples an ascent is by."""
    return direction.scope if isinstance(direction, Fresh) else "global"


class FreshGradient(Forgetful):
    """What the ascent has left, as it is."""

    def vectors(self, plan: Plan, gradients: Gradients, scale: Tensor | float = 1.0) -> list[Tensor]:
        """The gradients."""
        return gradients(list(plan.weights))

    def others(self, names: Sequence[str], gradients: Gradients) -> list[Tensor]:
        """The gradients."""
        return gradients(names)


@DIRECTIONS.register("fresh", "the gradient at w of this step's batch, by an ascent pass (SAM)", "arXiv 2010.01412")
def build(section: FreshDirection) -> Fresh:
    """The direction of the section `perturbation.direction`."""
    return Fresh(section.fraction, section.choose, section.scope)

"""The sections below `perturbation.direction`: where ε's direction comes from, one section for each source."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Field, model_validator
from typing_extensions import Self

from .section import Section, Share

Scope: TypeAlias = Literal["global", "shard_group", "worker", "micro_batch"]
Choose: TypeAlias = Literal["first", "random", "highest_loss"]
ChooseDescent: TypeAlias = Literal["sharpest", "highest_loss", "random"]


class _Ascending(Section):
    """What the sources have in common that have an ascent pass."""

    fraction: float = Field(
        1.0, gt=0.0, le=1.0, description="share of each micro-batch in the ascent; at least one image"
    )
    choose: Choose = Field(
        "first",
        description="which images these are: the first; random, others in each step; those of the highest loss, which "
        "costs a forward of all of them",
    )

    @model_validator(mode="after")
    def _chosen_of_some(self) -> Self:
        if self.choose != "first" and self.fraction == 1.0:
            raise ValueError(
                f"choose {self.choose} says which images are seen, and with fraction 1 all are; lower that"
            )
        return self


class FreshDirection(_Ascending):
    """The gradient at w of this step's batch (SAM, arXiv 2010.01412)."""

    source: Literal["fresh"] = Field(description="the gradient at w of this step's batch")
    scope: Scope = Field(
        "global",
        description="whose images an ascent is by (m-sharpness): all of a step's; those of a shard group (fsdp2 with "
        "replicas); of a worker, which is one process (not fsdp2, zero3); or of a micro-batch, each of which climbs, "
        "descends and is put back by itself",
    )


class FriendlyDirection(_Ascending):
    """A fresh gradient less the running mean of earlier ones (F-SAM, arXiv 2403.12350)."""

    source: Literal["friendly"] = Field(description="the gradient less the running mean of earlier ones")
    sigma: float = Field(1.0, ge=0.0, le=10.0, description="how much of the running mean is taken off")
    lmbda: Share = Field(0.9, description="share of the old mean that stays in the new one")


class VaSSODirection(_Ascending):
    """The running mean of fresh gradients (VaSSO, arXiv 2309.15639)."""

    source: Literal["vasso"] = Field(description="the running mean of gradients")
    theta: float = Field(0.9, gt=0.0, le=1.0, description="share of the fresh gradient in the mean")


class MomentumDirection(Section):
    """The base optimizer's momentum, further along the way the weights go (MSAM, arXiv 2401.12033); no ascent pass."""

    source: Literal["momentum"] = Field(description="the base optimizer's momentum")


class PreviousDirection(Section):
    """The descent gradient of the step before (S2-SAM, AsyncSAM); no ascent pass."""

    source: Literal["previous"] = Field(description="the descent gradient of the step before")


class DescentSection(Section):
    """The descent goes by a part of each micro-batch (ESAM, arXiv 2110.03141; K-SAM, arXiv 2210.12864)."""

    fraction: float = Field(gt=0.0, lt=1.0, description="share of each micro-batch in the descent; at least one image")
    choose: ChooseDescent = Field(
        "sharpest",
        description="which images these are: sharpest: whose loss rises most by the perturbation, which costs a "
        "forward of all of them; highest_loss, before the perturbation; random: others in each step",
    )


class GateSection(Section):
    """AE-SAM: a step perturbs only where its plain gradient is unusually long (arXiv 2304.14647)."""

    delta: float = Field(0.9, ge=0.0, lt=1.0, description="share of the old in the running mean and variance")
    first: float = Field(1.0, ge=-10.0, le=10.0, description="standard deviations above the mean, at the run's start")
    last: float = Field(-1.0, ge=-10.0, le=10.0, description="the same at its end")


def _fresh_unless_said(given: Any) -> Any:
    return {"source": "fresh", **given} if isinstance(given, dict) else given


Direction: TypeAlias = Annotated[
    FreshDirection | FriendlyDirection | VaSSODirection | MomentumDirection | PreviousDirection,
    Field(discriminator="source"),
    BeforeValidator(_fresh_unless_said),
]

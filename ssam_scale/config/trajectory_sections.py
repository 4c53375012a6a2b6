"""The section `trajectory`: a loss term that keeps the outputs near those of earlier weights, one section a kind."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field, model_validator
from typing_extensions import Self

from .section import Section


class _Term(Section):
    """What the kinds have in common."""

    weight: float = Field(gt=0.0, le=1000.0, description="factor of the term (lambda)")
    temperature: float = Field(
        5.0, gt=0.0, le=1000.0, description="what logits are divided by before softmax, on both sides (tau)"
    )
    start_epoch: int = Field(
        5, ge=0, le=10**6, description="epochs of training before the first one with the term (E_start)"
    )


class SAFTrajectory(_Term):
    """SAF (arXiv 2205.14083): the outputs of each image stay near its own of some epochs ago, which are remembered."""

    kind: Literal["saf"] = Field(description="each image's own outputs of some epochs ago, kept on disk")
    weight: float = Field(0.3, gt=0.0, le=1000.0, description="factor of the term (lambda)")
    lag_epochs: int = Field(
        3,
        ge=1,
        le=1000,
        description="how many epochs ago. An epoch's outputs take 2 bytes for each image and class, beside the "
        "checkpoints: of ImageNet 2.6 GB",
    )

    @model_validator(mode="after")
    def _remembered_by_then(self) -> Self:
        if self.start_epoch < self.lag_epochs:
            raise ValueError(
                f"start_epoch {self.start_epoch} is before lag_epochs {self.lag_epochs}, so that nothing is remembered "
                f"of {self.lag_epochs} epochs before; begin in epoch {self.lag_epochs} or later"
            )
        return self


class MESATrajectory(_Term):
    """MESA (arXiv 2205.14083): the outputs stay near those of averaged weights, which take a forward of their own."""

    kind: Literal["mesa"] = Field(description="the outputs of the exponential moving average of the weights")
    weight: float = Field(0.8, gt=0.0, le=1000.0, description="factor of the term (lambda)")
    decay: float = Field(
        0.9995,
        gt=0.0,
        lt=1.0,
        description="decay per step of that average (beta), apart from train.ema_decay; a run of few steps needs a "
        "lower one, for the average begins at the first weights",
    )


Trajectory: TypeAlias = Annotated[SAFTrajectory | MESATrajectory, Field(discriminator="kind")]

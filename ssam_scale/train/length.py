"""How long a run is: decided once, when the number of its images is known, and read by all that goes by its place."""

from __future__ import annotations

from dataclasses import dataclass

from ssam_scale.config.schema import Config
from ssam_scale.data import images_of_an_epoch
from ssam_scale.errors import UserError


@dataclass(frozen=True)
class Length:
    """The length of a run.

    Attributes:
        images: in the order of one epoch, of all processes.
        batch_size: images of a step.
        steps: optimizer steps of the whole run.
        in_epochs: whether it was given in epochs, so that it ends with one.
    """

    images: int
    batch_size: int
    steps: int
    in_epochs: bool = True

    @classmethod
    def of_epochs(cls, epochs: int, images: int, batch_size: int) -> Length:
        """That of so many epochs."""
        return cls(images, batch_size, epochs * (images // batch_size))

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one epoch; the images that fill none are left out."""
        return self.images // self.batch_size

    @property
    def epochs(self) -> float:
        """In epochs, of which the last may be a part of one."""
        return self.steps / self.steps_per_epoch

    @property
    def epochs_begun(self) -> int:
        """How many epochs have a step in the run."""
        return -(-self.steps // self.steps_per_epoch)

    def __str__(self) -> str:
        """As a run says it: "3 epochs of 80 steps", or "200 steps, 2.5 epochs of 80 steps"."""
        steps = "" if self.in_epochs else f"{self.steps} steps, "
        return f"{steps}{round(self.epochs, 2):.15g} epochs of {self.steps_per_epoch} steps"


def length_of(config: Config, images: int) -> Length:
    """How long the configured run is.

    Args:
        config: of the run.
        images: that `data.train` has.

    Raises:
        UserError: they are too few for a step, or what the configuration has begin in an epoch never does.
    """
    train, batch_size = config.train, config.data.batch_size
    images = images_of_an_epoch(config.data, images)
    if train.max_steps is None:
        assert train.epochs is not None  # which `Train` says
        return Length.of_epochs(train.epochs, images, batch_size)
    length = Length(images, batch_size, train.max_steps, in_epochs=False)
    said = f"train.max_steps {train.max_steps}, which is {length.epochs:.4g} epochs of {length.steps_per_epoch} steps"
    if (late := config.too_late(length.epochs, said)) is not None:
        raise UserError(late)
    return length

"""RandAugment (arXiv 1909.13719): some operations at random, all by one magnitude. As torchvision does it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ssam_scale.config.augment_sections import RandAugment
from ssam_scale.data.operations import IDENTITY, Resampling

from .interface import POLICIES, Kind, Numbers, Round, round_of

KINDS = (
    Kind(IDENTITY),
    Kind("shear_x", lambda level: 0.3 * level, signed=True),
    Kind("shear_y", lambda level: 0.3 * level, signed=True),
    Kind("translate_x", lambda level: 150.0 / 331.0 * level, signed=True),
    Kind("translate_y", lambda level: 150.0 / 331.0 * level, signed=True),
    Kind("rotate", lambda level: 30.0 * level, signed=True),
    Kind("brightness", lambda level: 1.0 + 0.9 * level, signed=True),
    Kind("color", lambda level: 1.0 + 0.9 * level, signed=True),
    Kind("contrast", lambda level: 1.0 + 0.9 * level, signed=True),
    Kind("sharpness", lambda level: 1.0 + 0.9 * level, signed=True),
    Kind("posterize", lambda level: 8.0 - np.round(4.0 * level)),
    Kind("solarize", lambda level: 255.0 * (1.0 - level)),
    Kind("auto_contrast"),
    Kind("equalize"),
)


@POLICIES.register("rand_augment", "some operations at random, as torchvision's RandAugment", "arXiv 1909.13719")
class RandAugmentPolicy:
    """A `Policy`: torchvision's 14 operations and their ranges, of which a magnitude of 30 is the end.

    Args:
        section: of the configuration.
        mean: not used: what lies outside is black.
    """

    resampling = Resampling()

    def __init__(self, section: RandAugment, mean: tuple[float, float, float]) -> None:
        self._section = section
        self.count = 2 * section.operations

    def rounds(self, numbers: Numbers) -> Sequence[Round]:
        """See `Policy`."""
        levels = np.full(len(numbers), self._section.magnitude / 30.0)
        return [round_of(KINDS, numbers[:, first], levels, numbers[:, first + 1]) for first in range(0, self.count, 2)]

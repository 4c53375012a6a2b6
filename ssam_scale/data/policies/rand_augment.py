"""RandAugment (arXiv 1909.13719): some operations at random, all by one magnitude. As torchvision does it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ssam_scale.config.augment_sections import RandAugment
from ssam_scale.data.operations import Resampling

from .interface import POLICIES, Numbers, Round, round_of
from .torchvision_kinds import torchvisions

KINDS = torchvisions(shear=0.3, shift=150.0 / 331.0, degrees=30.0, factor=0.9, bits=4.0)


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

"""TrivialAugment (arXiv 2103.10158): one operation at random, by a random magnitude. As torchvision's wide one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ssam_scale.config.augment_sections import TrivialAugment
from ssam_scale.data.operations import Resampling

from .interface import POLICIES, Numbers, Round, round_of
from .torchvision_kinds import torchvisions

_BINS = 31

# Shifts of 32 pixels of an image of ImageNet's usual 224: as a share, it suits the small ones too.
KINDS = torchvisions(shear=0.99, shift=32.0 / 224.0, degrees=135.0, factor=0.99, bits=6.0)


@POLICIES.register(
    "trivial_augment", "one operation by a random magnitude, as torchvision's TrivialAugmentWide", "arXiv 2103.10158"
)
class TrivialAugmentPolicy:
    """A `Policy`: each of 14 operations as likely, each of 31 magnitudes too.

    Args:
        section: of the configuration.
        mean: not used: what lies outside is black.
    """

    resampling = Resampling()
    count = 3

    def __init__(self, section: TrivialAugment, mean: tuple[float, float, float]) -> None:
        pass

    def rounds(self, numbers: Numbers) -> Sequence[Round]:
        """See `Policy`."""
        levels = np.floor(numbers[:, 1] * _BINS) / (_BINS - 1)
        return [round_of(KINDS, numbers[:, 0], levels, numbers[:, 2])]

"""TrivialAugment (arXiv 2103.10158): one operation at random, by a random magnitude. As torchvision's wide one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ssam_scale.config.augment_sections import TrivialAugment
from ssam_scale.data.operations import IDENTITY, Resampling

from .interface import POLICIES, Kind, Numbers, Round, round_of

_BINS = 31

KINDS = (
    Kind(IDENTITY),
    Kind("shear_x", lambda level: 0.99 * level, signed=True),
    Kind("shear_y", lambda level: 0.99 * level, signed=True),
    # 32 pixels of an image of ImageNet's usual 224: as a share, it suits the small ones too.
    Kind("translate_x", lambda level: 32.0 / 224.0 * level, signed=True),
    Kind("translate_y", lambda level: 32.0 / 224.0 * level, signed=True),
    Kind("rotate", lambda level: 135.0 * level, signed=True),
    Kind("brightness", lambda level: 1.0 + 0.99 * level, signed=True),
    Kind("color", lambda level: 1.0 + 0.99 * level, signed=True),
    Kind("contrast", lambda level: 1.0 + 0.99 * level, signed=True),
    Kind("sharpness", lambda level: 1.0 + 0.99 * level, signed=True),
    Kind("posterize", lambda level: 8.0 - np.round(6.0 * level)),
    Kind("solarize", lambda level: 255.0 * (1.0 - level)),
    Kind("auto_contrast"),
    Kind("equalize"),
)


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

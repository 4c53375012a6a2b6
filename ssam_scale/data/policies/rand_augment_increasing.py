"""timm's RandAugment with increasing severity (`rand-m9-mstd0.5-inc1`), which DeiT and ConvNeXt use."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ssam_scale.config.augment_sections import RandAugmentIncreasing
from ssam_scale.data.operations import IDENTITY, Resampling

from .interface import POLICIES, Kind, Numbers, Round, round_of

KINDS = (
    Kind("auto_contrast"),
    Kind("equalize"),
    Kind("invert"),
    Kind("rotate", lambda level: 30.0 * level, signed=True),
    Kind("posterize", lambda level: 4.0 - np.floor(4.0 * level)),
    Kind("solarize", lambda level: 256.0 - np.floor(256.0 * level)),
    Kind("solarize_add", lambda level: np.floor(110.0 * level)),
    Kind("color", lambda level: np.maximum(0.1, 1.0 + 0.9 * level), signed=True),
    Kind("contrast", lambda level: np.maximum(0.1, 1.0 + 0.9 * level), signed=True),
    Kind("brightness", lambda level: np.maximum(0.1, 1.0 + 0.9 * level), signed=True),
    Kind("sharpness", lambda level: np.maximum(0.1, 1.0 + 0.9 * level), signed=True),
    Kind("shear_x", lambda level: 0.3 * level, signed=True),
    Kind("shear_y", lambda level: 0.3 * level, signed=True),
    Kind("translate_x", lambda level: 0.45 * level, signed=True),
    Kind("translate_y", lambda level: 0.45 * level, signed=True),
)
_NUMBERS = 5  # of a round: which, whether, two for how much, in which direction


@POLICIES.register(
    "rand_augment_increasing", "some operations at random, as timm's rand-m9-mstd0.5-inc1", "arXiv 1909.13719"
)
class RandAugmentIncreasingPolicy:
    """A `Policy`: timm's 15 operations and their ranges, of which a magnitude of 10 is the end.

    timm draws for each operation whether pixels are interpolated linearly or bicubically: here they always are
    linearly.

    Args:
        section: of the configuration.
        mean: the colour of what lies outside.
    """

    def __init__(self, section: RandAugmentIncreasing, mean: tuple[float, float, float]) -> None:
        self._section = section
        self.count = _NUMBERS * section.operations
        self.resampling = Resampling(True, mean)

    def rounds(self, numbers: Numbers) -> Sequence[Round]:
        """See `Policy`."""
        return [self._round(*numbers[:, first : first + _NUMBERS].T) for first in range(0, self.count, _NUMBERS)]

    def _round(self, which: Numbers, whether: Numbers, radius: Numbers, angle: Numbers, sign: Numbers) -> Round:
        section = self._section
        normal = np.sqrt(-2.0 * np.log1p(-radius)) * np.cos(2.0 * np.pi * angle)  # Box-Muller
        levels = np.clip(section.magnitude + section.magnitude_std * normal, 0.0, 10.0) / 10.0
        chosen = round_of(KINDS, which, levels, sign)
        return Round(np.where(whether < section.probability, chosen.names, IDENTITY), chosen.magnitudes)

"""AutoAugment (arXiv 1805.09501): pairs of operations that were searched for on ImageNet. As torchvision does it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ssam_scale.config.augment_sections import AutoAugment
from ssam_scale.data.operations import IDENTITY, Resampling

from .interface import POLICIES, Kind, Numbers, Round, round_of
from .rand_augment import KINDS as _KINDS

_BY_NAME = {kind.name: kind for kind in (*_KINDS, Kind("invert"))}

# The paper's table 9: operation, probability, level from 0 to 9; twice in a row.
TABLE = """
posterize 0.4 8      rotate 0.6 9
solarize 0.6 5       auto_contrast 0.6 0
equalize 0.8 0       equalize 0.6 0
posterize 0.6 7      posterize 0.6 6
equalize 0.4 0       solarize 0.2 4
equalize 0.4 0       rotate 0.8 8
solarize 0.6 3       equalize 0.6 0
posterize 0.8 5      equalize 1.0 0
rotate 0.2 3         solarize 0.6 8
equalize 0.6 0       posterize 0.4 6
rotate 0.8 8         color 0.4 0
rotate 0.4 9         equalize 0.6 0
equalize 0.0 0       equalize 0.8 0
invert 0.6 0         equalize 1.0 0
color 0.6 4          contrast 1.0 8
rotate 0.8 8         color 1.0 2
color 0.8 8          solarize 0.8 7
sharpness 0.4 7      invert 0.6 0
shear_x 0.6 5        equalize 1.0 0
color 0.4 0          equalize 0.6 0
equalize 0.4 0       solarize 0.2 4
solarize 0.6 5       auto_contrast 0.6 0
invert 0.6 0         equalize 1.0 0
color 0.6 4          contrast 1.0 8
equalize 0.8 0       equalize 0.6 0
"""
_LAST = 9  # level


@POLICIES.register("auto_augment", "pairs of operations searched for on ImageNet", "arXiv 1805.09501")
class AutoAugmentPolicy:
    """A `Policy`: one of 25 pairs for each image, each operation of it with a probability of its own.

    Args:
        section: of the configuration.
        mean: not used: what lies outside is black.
    """

    resampling = Resampling()
    count = 5

    def __init__(self, section: AutoAugment, mean: tuple[float, float, float]) -> None:
        rows = [line.split() for line in TABLE.strip().splitlines()]
        self._pairs = [[row[:3], row[3:]] for row in rows]

    def rounds(self, numbers: Numbers) -> Sequence[Round]:
        """See `Policy`."""
        chosen = (numbers[:, 0] * len(self._pairs)).astype(int)
        return [self._half(chosen, half, *numbers[:, 1 + 2 * half : 3 + 2 * half].T) for half in (0, 1)]

    def _half(self, chosen: np.ndarray, half: int, whether: Numbers, signs: Numbers) -> Round:
        names, magnitudes = np.full(len(chosen), IDENTITY, dtype=object), np.zeros(len(chosen))
        for index, pair in enumerate(self._pairs):
            own = chosen == index
            name, probability, level = pair[half]
            levels = np.full(own.sum(), int(level) / _LAST)
            found = round_of([_BY_NAME[name]], np.zeros(len(levels)), levels, signs[own])
            names[own] = np.where(whether[own] < float(probability), found.names, IDENTITY)
            magnitudes[own] = found.magnitudes
        return Round(names.astype(str), magnitudes)

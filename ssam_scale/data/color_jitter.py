"""Random brightness, contrast and saturation, in random order: torchvision's ColorJitter without hue."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from ssam_scale.data.operations import Resampling
from ssam_scale.data.policies.interface import Numbers, Round

_NAMES = ("brightness", "contrast", "color")
_ORDERS = np.array(list(itertools.permutations(range(len(_NAMES)))))


class ColorJitter:
    """A `Policy`: all three for each image, by factors evenly distributed around 1.

    Args:
        strength: by how much factors differ from 1, at the most; none is below 0.
    """

    resampling = Resampling()
    count = 1 + len(_NAMES)

    def __init__(self, strength: float) -> None:
        self._low, self._high = max(0.0, 1.0 - strength), 1.0 + strength

    def rounds(self, numbers: Numbers) -> Sequence[Round]:
        """See `Policy`."""
        orders = _ORDERS[(numbers[:, 0] * len(_ORDERS)).astype(int)]
        factors = self._low + (self._high - self._low) * numbers[:, 1:]
        return [
            Round(np.array(_NAMES)[which], np.take_along_axis(factors, which[:, None], 1)[:, 0]) for which in orders.T
        ]

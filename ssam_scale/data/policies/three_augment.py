"""3-Augment (DeiT III, arXiv 2204.07118): gray, solarized or blurred, and then other colours."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ssam_scale.config.augment_sections import ThreeAugment
from ssam_scale.data.operations import Resampling

from .interface import POLICIES, Kind, Numbers, Round, round_of

KINDS = (
    Kind("grayscale"),
    Kind("solarize", lambda level: np.full_like(level, 128.0)),
    Kind("blur", lambda level: 0.1 + 1.9 * level),
)


@POLICIES.register("three_augment", "gray, solarized or blurred: DeiT III's", "arXiv 2204.07118")
class ThreeAugmentPolicy:
    """A `Policy`: each of the three as likely. DeiT III has `data.color_jitter: 0.3` behind it.

    Args:
        section: of the configuration.
        mean: not used: no pixel moves.
    """

    resampling = Resampling()
    count = 2

    def __init__(self, section: ThreeAugment, mean: tuple[float, float, float]) -> None:
        pass

    def rounds(self, numbers: Numbers) -> Sequence[Round]:
        """See `Policy`."""
        return [round_of(KINDS, numbers[:, 0], numbers[:, 1], numbers[:, 0])]

"""torchvision's operations of RandAugment and of TrivialAugment, which go to other ends."""

from __future__ import annotations

import numpy as np

from ssam_scale.data.operations import IDENTITY

from .interface import Kind


def torchvisions(*, shear: float, shift: float, degrees: float, factor: float, bits: float) -> tuple[Kind, ...]:
    """The 14 kinds, by the magnitudes that they end at.

    Args:
        shear: pixels to the side for each row.
        shift: share of the side.
        degrees: of a rotation.
        factor: how far that of brightness, colour, contrast and sharpness goes from 1.
        bits: that are lost of eight.
    """
    return (
        Kind(IDENTITY),
        *(Kind(name, lambda level: shear * level, signed=True) for name in ("shear_x", "shear_y")),
        *(Kind(name, lambda level: shift * level, signed=True) for name in ("translate_x", "translate_y")),
        Kind("rotate", lambda level: degrees * level, signed=True),
        *(
            Kind(name, lambda level: 1.0 + factor * level, signed=True)
            for name in ("brightness", "color", "contrast", "sharpness")
        ),
        Kind("posterize", lambda level: 8.0 - np.round(bits * level)),
        Kind("solarize", lambda level: 255.0 * (1.0 - level)),
        Kind("auto_contrast"),
        Kind("equalize"),
    )

"""Random erasing (arXiv 1708.04896): a box of noise in some images. As timm does it, by pixel."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ssam_scale.data.policies.interface import Numbers
from ssam_scale.perturbation.rng import mixed_

_TRIES = 10
COUNT = 4 + 2 * _TRIES
"""Numbers that are drawn for an image."""

_AREA = 0.02, 1.0 / 3.0
_LOG_RATIO = math.log(0.3), math.log(1.0 / 0.3)


def boxes(numbers: Numbers, probability: float, side: int) -> NDArray[np.int64]:
    """What is erased of square images: top, left, bottom and right of each, int64 [N, 4]; all 0: nothing.

    The area is a share of the image in [0.02, 1/3], height over width in [0.3, 1/0.3] and even in its logarithm; the
    first of ten draws that leaves something of the image in both directions.

    Args:
        numbers: [N, `COUNT`] in [0, 1).
        probability: of a box.
        side: of the images, pixels.
    """
    area = (_AREA[0] + (_AREA[1] - _AREA[0]) * numbers[:, 4::2]) * side**2
    ratio = np.exp(_LOG_RATIO[0] + (_LOG_RATIO[1] - _LOG_RATIO[0]) * numbers[:, 5::2])
    heights, widths = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (heights < side) & (widths < side)
    rows, first = np.arange(len(numbers)), fits.argmax(1)
    erased = fits.any(1) & (numbers[:, 0] < probability)
    height, width = heights[rows, first], widths[rows, first]
    top = np.floor(numbers[:, 1] * (side - height + 1))
    left = np.floor(numbers[:, 2] * (side - width + 1))
    return np.where(erased[:, None], np.stack([top, left, top + height, left + width], 1), 0).astype(np.int64)


def erase_(images: Tensor, which: Tensor, box: Tensor, seeds: Tensor) -> None:
    """Overwrite a box of some images with standard normal noise.

    Args:
        images: float [N, 3, H, W], normalised.
        which: int64 [n], of them.
        box: int64 [n, 4], top, left, bottom and right.
        seeds: int64 [n], of each one's noise.
    """
    height, width = images.shape[-2:]
    device = images.device
    own = images[which]
    place = torch.arange(own[0].numel(), device=device).view(own[0].shape)
    bits = mixed_(place + seeds[:, None, None, None])
    uniform = (bits & 0xFFFFFF).to(torch.float32).add_(0.5).mul_(2.0**-24)
    noise = uniform.mul_(2.0).sub_(1.0).erfinv_().mul_(math.sqrt(2.0))
    top, left, bottom, right = (edge[:, None, None, None] for edge in box.unbind(1))
    row, column = torch.arange(height, device=device)[:, None], torch.arange(width, device=device)
    inside = (row >= top) & (row < bottom) & (column >= left) & (column < right)
    images[which] = torch.where(inside, noise.to(images.dtype), own)

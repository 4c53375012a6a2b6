"""Mixup and CutMix of neighbours in a batch, the same for any number of processes and micro-batches."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

_MIX = 0x6D6978  # so that no other stream of a step's has these numbers


@dataclass(frozen=True)
class Mixture:
    """How the images of one step are mixed.

    Attributes:
        share: λ, of an image's own label; and of its pixels, where there is no box.
        box: top, left, bottom and right of what is cut out of the other image, as shares of the image's sides; None:
            all pixels are mixed.
    """

    share: float
    box: tuple[float, float, float, float] | None = None


class Mixing:
    """Mixup (arXiv 1710.09412) or CutMix (arXiv 1905.04899) of each image with its neighbour; if both, one at random.

    λ is drawn once for a step, from Beta(α, α), as it is once for a batch in both papers' code. It is a function of
    seed, epoch and step, and the other image is the neighbour in the batch: a run on several processes, or in several
    micro-batches, sees the images that a run on one sees, as long as a micro-batch's number of images is even.

    Args:
        mixup: α of mixup; 0: there is none.
        cutmix: α of CutMix; 0: there is none.
        classes: of the labels.
        seed: of the run.
    """

    def __init__(self, mixup: float, cutmix: float, classes: int, seed: int) -> None:
        self._mixup, self._cutmix, self._classes, self._seed = mixup, cutmix, classes, seed
        self._mixture = Mixture(1.0)

    def begin(self, epoch: int, step: int) -> None:
        """The batches that follow are of this step of this epoch, both from 0."""
        draw = np.random.default_rng((self._seed, epoch, step, _MIX))
        either = draw.random() < 0.5
        cut = self._cutmix > 0.0 and (either or not self._mixup)
        alpha = self._cutmix if cut else self._mixup
        share = float(draw.beta(alpha, alpha))
        box = None
        if cut:
            middle, half = draw.random(2), 0.5 * math.sqrt(1.0 - share)
            top, left = np.clip(middle - half, 0.0, 1.0)
            bottom, right = np.clip(middle + half, 0.0, 1.0)
            box = float(top), float(left), float(bottom), float(right)
        self._mixture = Mixture(share, box)

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """A mixed batch, on the same device.

        Args:
            images: floats of shape [N, 3, H, W]; stay as they are.
            labels: int64 of shape [N].

        Returns:
            Images in the same memory format, and the classes' shares of each, float32 of shape [N, classes].
        """
        targets = functional.one_hot(labels, self._classes).float()
        return mixed(images, targets, self._mixture)


def mixed(images: Tensor, targets: Tensor, mixture: Mixture) -> tuple[Tensor, Tensor]:
    """Images and targets mixed with their neighbours': the first with the second, the third with the fourth.

    The last of an odd number is mixed with the one before it; one alone with nothing.
    """
    count, (height, width) = len(images), images.shape[-2:]
    if count == 1:
        return images, targets
    share = mixture.share
    box: tuple[slice, ...] = ()
    if mixture.box is not None:
        top, left, bottom, right = mixture.box
        rows, columns = slice(int(top * height), int(bottom * height)), slice(int(left * width), int(right * width))
        box = (slice(None), slice(None), rows, columns)
        share = 1.0 - (rows.stop - rows.start) * (columns.stop - columns.start) / (height * width)
    out, labels = images.clone(), targets.clone()
    pairs = [(slice(0, count - 1, 2), slice(1, count, 2)), (slice(1, count, 2), slice(0, count - 1, 2))]
    if count % 2:
        pairs.append((slice(count - 1, count), slice(count - 2, count - 1)))
    for own, other in pairs:
        if box:
            out[own][box] = images[other][box]
        else:
            torch.lerp(images[other], images[own], share, out=out[own])
        torch.lerp(targets[other], targets[own], share, out=labels[own])
    return out, labels

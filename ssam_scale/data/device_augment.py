"""What is done to the pixels of a batch on the device: operations of a policy, other colours, erased boxes.

Numbers are drawn on the host, a function of seed, epoch and image like those of the crops, and sent in one piece: the
images are the same in whichever batch and on whichever process they are, and nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ssam_scale.config.schema import Data
from ssam_scale.data import erasing
from ssam_scale.data.augment import FIRST_OF_DEVICE, uniforms
from ssam_scale.data.color_jitter import ColorJitter
from ssam_scale.data.operations import IDENTITY, OPERATIONS, Resampling
from ssam_scale.data.policies import POLICIES, Policy


@dataclass(frozen=True)
class _Few:
    """An operation that is done to some images of a batch.

    Attributes:
        name: of the operation.
        places: of the images in the batch.
        magnitudes: of each.
        resampling: of pixels that move.
    """

    name: str
    places: NDArray[np.int64]
    magnitudes: NDArray[np.float64]
    resampling: Resampling


class DeviceAugment:
    """Augmentation of batches on the device; made by `device_augment`.

    Args:
        policies: whose operations are done one after another.
        erased: probability of an erased box.
        seed: of the run.
    """

    def __init__(self, policies: list[Policy], erased: float, seed: int) -> None:
        self._policies, self._erased, self._seed = policies, erased, seed
        self._count = sum(policy.count for policy in policies)

    def pixels(self, images: Tensor, keys: NDArray[np.int64], epoch: int) -> Tensor:
        """Images with operations done to them.

        Args:
            images: uint8 [N, 3, H, W]; may be changed.
            keys: int64 [N], what augmentation of each depends on beside seed and epoch.
            epoch: from 0.
        """
        if not self._policies:
            return images
        few = list(self._few(uniforms(self._seed, epoch, keys, FIRST_OF_DEVICE + erasing.COUNT, self._count)))
        # float64 holds places as they are.
        table = np.concatenate([np.zeros((2, 0)), *(np.stack([f.places, f.magnitudes]) for f in few)], 1)
        sent, start = _sent(table, images.device), 0
        for each in few:
            part = slice(start, start := start + len(each.places))
            places, magnitudes = sent[0, part].long(), sent[1, part].float()
            images[places] = OPERATIONS[each.name](images[places], magnitudes, each.resampling)
        return images

    def normalised_(self, images: Tensor, keys: NDArray[np.int64], epoch: int) -> None:
        """Erase boxes of normalised images.

        Args:
            images: float [N, 3, H, W], written to.
            keys: as of `pixels`.
            epoch: from 0.
        """
        if not self._erased:
            return
        numbers = uniforms(self._seed, epoch, keys, FIRST_OF_DEVICE, erasing.COUNT)
        boxes = erasing.boxes(numbers, self._erased, images.shape[-1])
        which = np.flatnonzero(boxes.any(1))
        if not len(which):
            return
        seeds = (numbers[which, 3] * 2.0**53).astype(np.int64)
        columns = _sent(np.column_stack([which, boxes[which], seeds]), images.device)
        erasing.erase_(images, columns[:, 0], columns[:, 1:5], columns[:, 5])

    def _few(self, numbers: NDArray[np.float64]) -> Iterator[_Few]:
        first = 0
        for policy in self._policies:
            for each in policy.rounds(numbers[:, first : first + policy.count]):
                for name in np.unique(each.names).tolist():
                    if name != IDENTITY:
                        places = np.flatnonzero(each.names == name)
                        yield _Few(name, places, each.magnitudes[places], policy.resampling)
            first += policy.count


def device_augment(data: Data, seed: int) -> DeviceAugment | None:
    """What a configuration asks for; None: nothing is done on the device."""
    policies: list[Policy] = []
    if data.augment is not None:
        red, green, blue = (255.0 * share for share in data.mean)
        policies.append(POLICIES[data.augment.policy].value(data.augment, (red, green, blue)))
    if data.color_jitter:
        policies.append(ColorJitter(data.color_jitter))
    if not policies and not data.erasing:
        return None
    return DeviceAugment(policies, data.erasing, seed)


def _sent(array: NDArray[np.generic], device: torch.device) -> Tensor:
    """On the device, by a copy that nothing waits for."""
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)

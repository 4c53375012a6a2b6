"""Images that are not what was written: none of them is trained on."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ssam_scale.data.images import Images
from ssam_scale.errors import UserError

OnDamaged = Literal["stop", "skip"]


class Damaged:
    """What becomes of damaged images: the run ends, or the next image takes their place.

    Which image that is depends on nothing else, so that all processes and a resumed run see the same.

    Args:
        images: all of them.
        policy: what becomes of them.

    Attributes:
        instead: by damaged image, what is seen in its place.
    """

    def __init__(self, images: Images, policy: OnDamaged) -> None:
        self._images, self._policy = images, policy
        self.instead: dict[int, int] = {}

    def replaced(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """The images that are seen in the place of these, as far as is known."""
        if not self.instead:
            return indices
        return np.array([self.instead.get(int(index), int(index)) for index in indices], np.int64)

    def replace(self, index: int, is_sound: Callable[[int], bool]) -> int:
        """Find what takes the place of a damaged image.

        Args:
            index: of the image.
            is_sound: decodes another one; whether that is as it was written.

        Raises:
            UserError: the policy is to stop, or no image of the file is sound.
        """
        images = self._images
        if self._policy == "stop":
            raise UserError(
                f"{images.complaint(index)}, or go on without it (data.on_damaged=skip; `ssam-scale data check "
                f"{shlex.quote(images.place)}` lists all that are)"
            )
        for step in range(1, images.images):
            other = (index + step) % images.images
            if is_sound(other):
                self.instead[index] = other
                return other
        raise UserError(f"{images.path}: all of its {images.images:,} images are damaged; copy or write it again")

"""Images that are not what was written: none of them is trained on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ssam_scale.errors import UserError

OnDamaged = Literal["stop", "skip"]


class Damaged:
    """What becomes of damaged images of a file: the run ends, or the next image of the file takes their place.

    Which image that is depends on nothing else, so that all processes and a resumed run see the same.

    Args:
        path: of the file.
        images: how many it has.
        policy: what becomes of them.

    Attributes:
        instead: by damaged image, what is seen in its place.
    """

    def __init__(self, path: Path, images: int, policy: OnDamaged) -> None:
        self._path, self._images, self._policy = path, images, policy
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
        if self._policy == "stop":
            raise UserError(
                f"{self._path}: image {index} is damaged; copy or write the file again, or go on without it "
                f"(data.on_damaged=skip; `ssam-scale data check {self._path}` lists all that are)"
            )
        for step in range(1, self._images):
            other = (index + step) % self._images
            if is_sound(other):
                self.instead[index] = other
                return other
        raise UserError(f"{self._path}: all of its {self._images:,} images are damaged; copy or write it again")

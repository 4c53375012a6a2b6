"""What each format of an exported network is."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from torch import Tensor

from ssam_scale.trained.network import Trained


class Format(Protocol):
    """A way of writing a network, and of reading it back by what is going to read it.

    Attributes:
        is_folder: whether it is a folder; else a file.
        tolerance: how far logits may be from ours, relative to the largest of them or 1.
    """

    is_folder: bool
    tolerance: float

    def check(self) -> None:
        """Look for what it needs. Raises UserError: it is not installed; says how it would be."""

    def write(self, trained: Trained, place: Path) -> None:
        """Write a network to an empty folder, or in the place of an empty file.

        Raises:
            UserError: it cannot be written so; says why.
        """

    def logits(self, place: Path, images: Tensor) -> Tensor:
        """Read it back: float32 [N, classes] of normalised images [N, 3, side, side], on the CPU."""

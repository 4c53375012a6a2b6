"""What a policy of augmentation is: which operations are done to an image, by numbers that are drawn for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ssam_scale.data.operations import Resampling
from ssam_scale.registry import Registry

Numbers = NDArray[np.float64]
"""Of shape [N, numbers of an image], evenly distributed over [0, 1)."""


@dataclass(frozen=True)
class Round:
    """One operation for each image of a batch.

    Attributes:
        names: str [N], of `operations.OPERATIONS`, or `IDENTITY`.
        magnitudes: float [N], what the operation takes.
    """

    names: NDArray[np.str_]
    magnitudes: NDArray[np.float64]


class Policy(Protocol):
    """A distribution over operations.

    Attributes:
        count: how many numbers are drawn for an image.
        resampling: of the operations that move pixels.
    """

    count: int
    resampling: Resampling

    def rounds(self, numbers: Numbers) -> Sequence[Round]:
        """What is done to images, one round after another, as a function of [N, count] numbers."""


MakePolicy = Callable[[Any, tuple[float, float, float]], Policy]
"""From a section of a configuration, and the mean colour of images, red, green and blue in [0, 255]."""

POLICIES: Registry[MakePolicy] = Registry("ssam_scale.data.policies")


@dataclass(frozen=True)
class Kind:
    """An operation as a policy uses it.

    Attributes:
        name: of `operations.OPERATIONS`, or `IDENTITY`.
        at: the operation's magnitude, for levels in [0, 1].
        signed: whether the other direction is as likely: with the level's sign changed.
    """

    name: str
    at: Callable[[Numbers], Numbers] = np.zeros_like
    signed: bool = False


def round_of(kinds: Sequence[Kind], which: Numbers, levels: Numbers, signs: Numbers) -> Round:
    """One of several kinds for each image, all as likely.

    Args:
        kinds: to choose from.
        which: [N] numbers in [0, 1) that choose.
        levels: [N] in [0, 1], how much.
        signs: [N] numbers in [0, 1), for the direction.
    """
    chosen = (which * len(kinds)).astype(int)
    magnitudes = np.zeros(len(which))
    for index, kind in enumerate(kinds):
        own = chosen == index
        signed = np.where((signs[own] < 0.5) & kind.signed, -levels[own], levels[own])
        magnitudes[own] = kind.at(signed)
    return Round(np.array([kind.name for kind in kinds])[chosen], magnitudes)

"""Of which samples of a batch the descent is: ESAM's and K-SAM's selection of data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from ssam_scale.checks import check_choice, check_number
from ssam_scale.config.direction_sections import ChooseDescent


@dataclass(frozen=True)
class DescentSamples:
    """The samples of each micro-batch that the descent goes by: their mean loss is what is descended.

    `sharpest` takes those whose loss rises most from w to w + ε (ESAM's sharpness-sensitive data selection, arXiv
    2110.03141, section 3.2), which costs a forward of all at w + ε. `highest_loss` takes those of the highest loss at w
    (K-SAM, arXiv 2210.12864): where the ascent sees all samples its own forward tells, else one more does, which an
    ascent that chooses by it as well shares. `random` takes others in each step. Each process chooses among its own.
    A step without an ascent goes by all.

    Attributes:
        fraction: share of each micro-batch, in (0, 1); at least one sample.
        choose: which.

    Raises:
        TypeError, ValueError: something is of another kind or out of its range.
    """

    fraction: float
    choose: ChooseDescent = "sharpest"

    def __post_init__(self) -> None:
        check_number("fraction", self.fraction, "a share in (0, 1)", lambda share: 0.0 < share < 1.0)
        check_choice("choose", self.choose, get_args(ChooseDescent))

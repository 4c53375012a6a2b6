"""Where the direction of ε comes from: a fresh gradient, the base optimizer's momentum, the gradient before, a mean."""

from .build import build_direction
from .fresh import Fresh, scope_of
from .friendly import Friendly
from .interface import DIRECTIONS, Ascending, Direction, Source, check_direction
from .kept import Kept
from .momentum import Momentum
from .previous import Previous
from .vasso import VaSSO

__all__ = [
    "DIRECTIONS",
    "Ascending",
    "Direction",
    "Fresh",
    "Friendly",
    "Kept",
    "Momentum",
    "Previous",
    "Source",
    "VaSSO",
    "build_direction",
    "check_direction",
    "scope_of",
]

"""The phases of a step: the names under which a timer is told what runs now."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, TypeAlias

Phase = Literal[
    "data",
    "reference",
    "ascent forward",
    "ascent backward",
    "perturb",
    "descent forward",
    "descent backward",
    "optimizer",
]
Phases: TypeAlias = Callable[[Phase], AbstractContextManager[object]]
"""Called as `with phases("perturb"):` around each phase; `tracking.timer.PhaseTimer` is one."""


def no_phases(phase: Phase) -> AbstractContextManager[None]:
    """A timer that measures nothing."""
    return nullcontext()

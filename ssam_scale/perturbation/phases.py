"""The parts of a step that can be timed: the step names them, who measures them is not its business."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, TypeAlias

Phase = Literal[
    "data",
    "ascent forward",
    "ascent backward",
    "perturb",
    "descent forward",
    "descent backward",
    "optimizer",
]
Phases: TypeAlias = Callable[[Phase], AbstractContextManager[object]]


def no_phases(phase: Phase) -> AbstractContextManager[None]:
    """Measure nothing."""
    return nullcontext()

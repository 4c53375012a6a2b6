"""When there is an ascent, and how far: the radius over time, every k-th step, a part of the run."""

from .build import build_schedule
from .interface import (
    RADIUS_SCHEDULES,
    WRAPPERS,
    RadiusSchedule,
    check_schedule,
    ever_reuses,
    register_schedule,
    reuse_at,
)
from .interval import Interval
from .radius.constant import ConstantRadius
from .radius.cosine import CosineRadius
from .radius.lr import LRRadius
from .window import Window

__all__ = [
    "RADIUS_SCHEDULES",
    "WRAPPERS",
    "ConstantRadius",
    "CosineRadius",
    "Interval",
    "LRRadius",
    "RadiusSchedule",
    "Window",
    "build_schedule",
    "check_schedule",
    "ever_reuses",
    "register_schedule",
    "reuse_at",
]

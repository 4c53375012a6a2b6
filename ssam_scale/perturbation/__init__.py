"""The step: which gradient is taken where, and what comes back exactly as it was."""

from .ascent import Norm
from .costs import ascent_seconds
from .levers import Levers
from .phases import Phase, Phases, no_phases
from .radius import ConstantRadius, CosineRadius, Interval, RadiusSchedule, TiedRadius, Window
from .scores import sampled_label_loss
from .sparse_sam import SparseSAM
from .stages import Stage, StagedModel

__all__ = [
    "ConstantRadius",
    "CosineRadius",
    "Interval",
    "Levers",
    "Norm",
    "Phase",
    "Phases",
    "RadiusSchedule",
    "SparseSAM",
    "Stage",
    "StagedModel",
    "TiedRadius",
    "Window",
    "ascent_seconds",
    "no_phases",
    "sampled_label_loss",
]

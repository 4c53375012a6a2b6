"""The step: which gradient is taken where, and what comes back exactly as it was."""

from .perturb import Norm
from .phases import Phase, Phases, no_phases
from .profiling import ascent_seconds
from .savings import Levers
from .schedules import ConstantRadius, CosineRadius, Interval, RadiusSchedule, TiedRadius, Window
from .scores import sampled_label_loss
from .sparse_sam import SparseSAM
from .staged_model import Stage, StagedModel

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

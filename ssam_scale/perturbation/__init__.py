"""SparseSAM and its step: the ascent pass, the perturbation, the descent pass, the base optimizer."""

from ssam_scale import torch_compat  # noqa: F401 - refuses a torch that is too old, before anything looks for more

from .descent_samples import DescentSamples
from .directions import Direction, Fresh, Friendly, Momentum, Previous, VaSSO
from .gate import Gate
from .phases import Phase, Phases, no_phases
from .profiling import ascent_seconds
from .resolved_step import Norm, ResolvedStep, StepOptions, StepShares, resolve_step, step_shares
from .savings import Savings
from .schedules import ConstantRadius, CosineRadius, Interval, LRRadius, RadiusSchedule, Window
from .scores import sampled_label_loss
from .sparse_sam import SparseSAM
from .staged_model import Stage, StagedModel
from .step_report import Rehearsed, StepKind, StepReport

__all__ = [
    "ConstantRadius",
    "CosineRadius",
    "DescentSamples",
    "Direction",
    "Fresh",
    "Friendly",
    "Gate",
    "Interval",
    "LRRadius",
    "Momentum",
    "Norm",
    "Phase",
    "Phases",
    "Previous",
    "RadiusSchedule",
    "Rehearsed",
    "ResolvedStep",
    "Savings",
    "SparseSAM",
    "Stage",
    "StagedModel",
    "StepKind",
    "StepOptions",
    "StepReport",
    "StepShares",
    "VaSSO",
    "Window",
    "ascent_seconds",
    "no_phases",
    "resolve_step",
    "sampled_label_loss",
    "step_shares",
]

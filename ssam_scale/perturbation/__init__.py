"""The step: which gradient is taken where, and what comes back exactly as it was."""

from .phases import Phase, Phases, no_phases
from .sparse_sam import SparseSAM
from .stages import Stage, StagedModel

__all__ = ["Phase", "Phases", "SparseSAM", "Stage", "StagedModel", "no_phases"]

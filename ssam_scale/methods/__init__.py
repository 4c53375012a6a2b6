"""Methods that are more than a direction: loss terms by outputs of earlier weights (SAF, MESA), one file each.

Named points of the space that `perturbation` spans are data, and in `config/presets.py`.
"""

from .interface import TRAJECTORIES, Average, Reference, TrainingRun, Trajectory, build_trajectory, trajectory_loss
from .memory import OutputMemory
from .mesa import MESA
from .saf import SAF

__all__ = [
    "MESA",
    "SAF",
    "TRAJECTORIES",
    "Average",
    "OutputMemory",
    "Reference",
    "TrainingRun",
    "Trajectory",
    "build_trajectory",
    "trajectory_loss",
]

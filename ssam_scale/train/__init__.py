"""Training: the loop, the hooks around its steps and epochs, evaluation, checkpoints."""

from .loop import dry_run, train
from .preflight import examine

__all__ = ["dry_run", "examine", "train"]

"""Training: the loop, the hooks around its steps and epochs, evaluation, checkpoints."""

from .loop import dry_run, train

__all__ = ["dry_run", "train"]

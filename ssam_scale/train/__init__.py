"""Training: the loop, evaluation, checkpoints, averaged weights. No backend and no mask is named in here."""

from .loop import dry_run, train

__all__ = ["dry_run", "train"]

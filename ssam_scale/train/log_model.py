"""The trained network as a model of MLflow, at the end of a run."""

from __future__ import annotations

from ssam_scale.config.schema import Config
from ssam_scale.tracking.run import Run

from . import checkpoint
from .hooks import Hook
from .progress import Progress


class LogModel(Hook):
    """Stores the network of the last checkpoint with the run, on the one process that tracks.

    Args:
        config: of the run.
        run: where.
        progress: of the run.
    """

    def __init__(self, config: Config, run: Run, progress: Progress) -> None:
        self._config, self._run, self._progress = config, run, progress

    def on_end(self, error: BaseException | None) -> None:
        """After the last checkpoint is saved, if training is complete."""
        if error is not None or self._run.id is None:
            return
        path = checkpoint.newest(self._config.checkpoint.directory)
        assert path is not None  # saved after the last epoch
        self._run.log_network(
            lambda: checkpoint.network_of(path, self._config),
            side=self._config.data.eval_resolution,
            classes=self._config.model.num_classes,
            step=self._progress.step,
        )

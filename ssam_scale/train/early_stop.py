"""Whether a run stops before its length, because its evaluations have not improved for long enough."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ssam_scale.config.schema import EarlyStop

_SAVED = ("metric", "best", "best_step", "waited", "step")


@dataclass
class Patience:
    """The best evaluation so far, and how many have come since: a part of how far a run has come.

    Whether the run stops follows from it and the configuration, so that one with more patience, or without early
    stopping, goes on from the checkpoint of a run that has stopped.

    Attributes:
        section: of the configuration; None: there is no early stopping.
        metric: that `best` is of.
        best: the metric at its best; None: there was no finite one.
        best_step: steps done then.
        waited: evaluations since, without an improvement.
        step: steps done at the last evaluation that was observed.
    """

    section: EarlyStop | None = None
    metric: str | None = None
    best: float | None = None
    best_step: int = 0
    waited: int = 0
    step: int = 0

    @property
    def over(self) -> bool:
        """Whether the run stops."""
        return self.section is not None and self.metric == self.section.metric and self.waited >= self.section.patience

    def observe(self, value: float, step: int) -> None:
        """Take note of an evaluation; of the same weights only once, as one that is made again after an interruption.

        Args:
            value: of the metric, the same on all processes; one that is not finite is no improvement.
            step: steps done.
        """
        assert self.section is not None
        if self.metric != self.section.metric:  # another run's, or none
            self.metric, self.best, self.best_step, self.waited, self.step = self.section.metric, None, 0, 0, 0
        if step <= self.step:
            return
        self.step = step
        if self.section.improves(value, self.best):
            self.best, self.best_step, self.waited = value, step, 0
        else:
            self.waited += 1

    def __str__(self) -> str:
        """Why the run stops, in a line."""
        assert self.section is not None
        count = f"{self.waited} evaluation{'s'[: self.waited > 1]}"
        if self.best is None:
            return f"early stop: {self.metric} was not finite in {count}"
        by = f" by more than {self.section.min_delta:g}" if self.section.min_delta else ""
        return (
            f"early stop: {self.metric} has not improved{by} for {count}; it was {self.best:.6g} after step "
            f"{self.best_step}"
        )

    def state_dict(self) -> dict[str, Any]:
        """All but what the configuration says."""
        return {name: getattr(self, name) for name in _SAVED}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned.

        Raises:
            KeyError: an attribute is missing.
        """
        for name in _SAVED:
            setattr(self, name, state_dict[name])

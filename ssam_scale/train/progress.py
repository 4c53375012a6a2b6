"""How far a run has come, and what a person sees of it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from ssam_scale.console import console
from ssam_scale.perturbation import StepReport

from .early_stop import Patience
from .hooks import Hook
from .length import Length

T = TypeVar("T")

_LINE_SECONDS = 30.0
_SAVED = ("epoch", "seen", "step", "unevaluated", "run_id")  # what else `Progress` has is as configured
_SAVED_SINCE = ("closed",)  # what older checkpoints have not


@dataclass
class Progress:
    """How far a run has come: counted by the training loop, saved with every checkpoint.

    A run's place is in epochs and images, which mean the same whatever a step is: a run that is resumed with another
    batch size or number of images has other steps from then on. `place` is that place in steps of the size that they
    have now, and what the learning rate, radius, window, refreshes and annealing go by. `step` counts on, as records
    do.

    Attributes:
        length: of the run, and of an epoch, as they are now.
        epoch: epochs done.
        seen: images of the epoch that goes on which have been trained on, whatever the steps were.
        step: optimizer steps done since the run began, of whatever size they were.
        closed: whether what ends an epoch was done in the middle of one, where the run ended.
        unevaluated: whether what comes between epochs is not done after the last one: a signal has ended the run there.
        run_id: MLflow's of the run, also while it is not recorded there; None: it never was.
        patience: whether the run stops before its length.
    """

    length: Length
    epoch: int = 0
    seen: int = 0
    step: int = 0
    closed: bool = False
    unevaluated: bool = False
    run_id: str | None = None
    patience: Patience = field(default_factory=Patience)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one epoch, as they are now; the images that fill none are left out."""
        return self.length.steps_per_epoch

    @property
    def steps_left(self) -> int:
        """Steps that the epoch has left, as far as the run goes."""
        return max(0, min(self._left_of_epoch, self.length.steps - self.place))

    @property
    def step_of_epoch(self) -> int:
        """Steps done of the epoch that goes on, if all were of the size that they have now.

        Counted from the epoch's end, so that it ends in step `steps_per_epoch` also where steps of another size have
        seen a number of images that is not a multiple of this size: half a step then counts as one, or as none.
        """
        return self.steps_per_epoch - self._left_of_epoch

    @property
    def place(self) -> int:
        """The steps that have been done if all were of the size that they have now: epochs done, in steps."""
        return self.epoch * self.steps_per_epoch + self.step_of_epoch

    @property
    def epochs(self) -> float:
        """Epochs done, the part of the one that goes on included; a whole number between two."""
        return self.epoch + self.step_of_epoch / self.steps_per_epoch if self.seen else self.epoch

    @property
    def ended(self) -> bool:
        """Whether no step is left, and what ends the last epoch is done: what comes between epochs may not be."""
        return (self.place >= self.length.steps or self.patience.over) and (not self.seen or self.closed)

    @property
    def stopped_early(self) -> bool:
        """Whether the run has ended before its length."""
        return self.ended and self.place < self.length.steps

    def __str__(self) -> str:
        """Where the run is, as its lines say it: "epoch 2/3", or "step 80/200"."""
        done, of = (self.epoch, self.length.epochs_begun) if self.length.in_epochs else (self.place, self.length.steps)
        return f"{'epoch' if self.length.in_epochs else 'step'} {done}/{of}"

    @property
    def _left_of_epoch(self) -> int:
        return max(0, self.length.images - self.seen) // self.length.batch_size

    def after_step(self) -> None:
        """Counts one."""
        self.step += 1
        self.seen += self.length.batch_size
        self.closed = False

    def after_epoch(self) -> None:
        """Counts one; where the run ends within it, it stays the one that goes on: a longer run has the rest of it."""
        if self._left_of_epoch:
            self.closed = True
        else:
            self.epoch, self.seen, self.closed = self.epoch + 1, 0, False

    def state_dict(self) -> dict[str, Any]:
        """What a run of other steps needs of it, too."""
        saved = {name: getattr(self, name) for name in (*_SAVED, *_SAVED_SINCE)}
        return {**saved, "patience": self.patience.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned.

        Raises:
            KeyError: an attribute is missing.
        """
        for name in _SAVED:
            setattr(self, name, state_dict[name])
        for name in _SAVED_SINCE:
            setattr(self, name, state_dict.get(name, getattr(self, name)))
        if "patience" in state_dict:
            self.patience.load_state_dict(state_dict["patience"])


class ProgressBar(Hook):
    """A bar with the time left on a terminal; elsewhere (a log file) a line with it twice a minute.

    Args:
        total: steps of the whole run.
        done: steps of it that were done before.
        visible: false on the processes that do not print.
    """

    def __init__(self, total: int, done: int, visible: bool) -> None:
        self._console = console(quiet=not visible)
        self._total, self._first = total, done
        self._started = self._printed = time.monotonic()
        self._text = ""
        self._bar = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
            console=self._console,
            disable=not (visible and self._console.is_terminal),
        )
        self._task = self._bar.add_task("training", total=total, completed=done, unit="steps", text="")

    def __enter__(self) -> ProgressBar:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._bar.stop()

    def after_step(self, progress: Progress, report: StepReport) -> None:
        """One step is done."""
        self._bar.update(self._task, completed=progress.place)
        now = time.monotonic()
        if not self._console.is_terminal and now - self._printed >= _LINE_SECONDS:
            self._printed = now
            rate = (now - self._started) / (progress.place - self._first)
            left = timedelta(seconds=round(rate * (self._total - progress.place)))
            self._console.print(f"step {progress.place}/{self._total}, {left} left, {self._text}", soft_wrap=True)

    def show(self, text: str) -> None:
        """The latest figures."""
        self._text = text
        self._bar.update(self._task, text=text)

    def track(self, items: Iterable[T], label: str, total: int) -> Iterator[T]:
        """Pass on `items`, `total` batches, with a bar of their own below."""
        task = self._bar.add_task(label, total=total, unit="batches", text="")
        try:
            for item in items:
                yield item
                self._bar.advance(task)
        finally:
            self._bar.remove_task(task)

    def say(self, text: str) -> None:
        """A line that stays."""
        self._console.print(text, highlight=False, soft_wrap=True)

"""The one clock: how long a device works, whether or not the host waits for it.

`clock_of` gives a clock whose marks are taken now and read later, so that the host can run ahead of a GPU as it does in
training. `timed` measures a block by itself: the device is idle when it begins and when it ends.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch


class Clock(Protocol):
    """Marks points in time, now, and tells later how far apart they are."""

    def mark(self) -> Any:
        """The time at which the device will have done all that it was given until now."""

    def passed(self, mark: Any) -> bool:
        """Whether the device has reached `mark`; never waits."""

    def wait(self, mark: Any) -> None:
        """Block the host until the device has reached `mark`."""

    def seconds(self, start: Any, end: Any) -> float:
        """Time between two marks, both of which the device has passed."""

    def release(self, marks: Iterable[Any]) -> None:
        """Take marks back that will not be read again."""


class HostClock:
    """`time.perf_counter`, for devices that the host waits for anyway: a mark is passed as soon as it is taken."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.mark = now

    def passed(self, mark: float) -> bool:
        """Always."""
        return True

    def wait(self, mark: float) -> None:
        """Return at once."""

    def seconds(self, start: float, end: float) -> float:
        """Difference of the readings."""
        return end - start

    def release(self, marks: Iterable[float]) -> None:
        """Nothing to do: marks are numbers."""


class CudaClock:
    """`torch.cuda.Event`s on the current stream, reused because creating one costs more than recording one."""

    def __init__(self, new_event: Callable[[], Any] | None = None) -> None:
        if new_event is None:
            import torch

            def new_event() -> Any:
                return torch.cuda.Event(enable_timing=True)

        self._new_event = new_event
        self._free: list[Any] = []

    def mark(self) -> Any:
        """Record an event."""
        event = self._free.pop() if self._free else self._new_event()
        event.record()
        return event

    def passed(self, mark: Any) -> bool:
        """Whether the stream has reached the event."""
        return bool(mark.query())

    def wait(self, mark: Any) -> None:
        """Block the host until the stream has reached the event."""
        mark.synchronize()

    def seconds(self, start: Any, end: Any) -> float:
        """Time between two events, which know it in milliseconds."""
        return float(start.elapsed_time(end)) / 1000.0

    def release(self, marks: Iterable[Any]) -> None:
        """Keep the events for later marks."""
        self._free.extend(marks)


def clock_of(device: torch.device | str) -> Clock:
    """The clock of a device: events on CUDA, the host's clock for everything else."""
    return CudaClock() if str(device).startswith("cuda") else HostClock()


@dataclass
class Timed:
    """A block's duration: `seconds`, NaN until it has ended."""

    seconds: float = float("nan")


@contextmanager
def timed(device: torch.device) -> Iterator[Timed]:
    """Wall-clock seconds of a block, what it gave the device to do included: waits for the device before and after."""
    block = Timed()
    _synchronize(device)
    start = time.perf_counter()
    yield block
    _synchronize(device)
    block.seconds = time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)

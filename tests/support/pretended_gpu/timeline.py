"""Streams as vector clocks: what an operator may rely on having happened before it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TypeAlias

Clock: TypeAlias = dict[int, int]
"""By stream, how many of its operators are known to have ended."""


class Timeline:
    """Which operators of other streams, and of the host, are ordered before what a stream does next.

    Attributes:
        waits: how often the host waited for the device, by what it called and where.
        place: names the place of a call for `waits`.
    """

    def __init__(self) -> None:
        self._known: dict[int, Clock] = {}  # by stream
        self._launched: Clock = {}
        self._host: Clock = {}
        self.waits: Counter[tuple[str, str]] = Counter()
        self.place: Callable[[], str] = lambda: ""

    def launch(self, stream: int) -> int:
        """An operator goes to a stream; returns its number there."""
        number = self._launched[stream] = self._launched.get(stream, 0) + 1
        known = self._known.setdefault(stream, {})
        _join(known, self._host)
        known[stream] = number
        return number

    def ordered(self, before: tuple[int, int], stream: int) -> bool:
        """Whether the operator `before`, given as its stream and number, has ended when `stream`'s next one begins."""
        known = self._known.get(stream, {})
        return before[1] <= max(known.get(before[0], 0), self._host.get(before[0], 0)) or before[0] == stream

    def record(self, stream: int) -> Clock:
        """All that an event recorded on a stream now stands for."""
        return dict(self._known.get(stream, {}))

    def everything(self) -> Clock:
        """All that was launched."""
        return dict(self._launched)

    def wait(self, stream: int, recorded: Clock | None) -> None:
        """What a stream does next begins after what was recorded."""
        if recorded is not None:
            _join(self._known.setdefault(stream, {}), recorded)

    def host_waits(self, how: str, recorded: Clock | None) -> None:
        """The host goes on after what was recorded."""
        self.waits[how, self.place()] += 1
        if recorded is not None:
            _join(self._host, recorded)


def _join(clock: Clock, other: Clock) -> None:
    for stream, number in other.items():
        clock[stream] = max(clock.get(stream, 0), number)

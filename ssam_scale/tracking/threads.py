"""What tracking computes in the background: tables and pictures are made while training goes on."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping

from ssam_scale.tracking.store import one_line

_log = logging.getLogger(__name__)

# CPU time of background tasks over wall-clock time. They hold the interpreter's lock, for which training waits.
_SHARE = 0.004


class Background:
    """Runs the newest task of each kind, rarely enough to take 0.4% of the time: it pauses 250 times a task's CPU time.

    Args:
        costs: of each kind, the CPU seconds that the first task is expected to take.
    """

    def __init__(self, costs: Mapping[str, float]) -> None:
        started = time.monotonic()
        self._not_before = {kind: started + cost / _SHARE for kind, cost in costs.items()}
        self._tasks: dict[str, Callable[[], None]] = {}
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="tracking artifacts", daemon=True)
        self._thread.start()

    def put(self, kind: str, task: Callable[[], None]) -> None:
        """Accept a task in the place of one of its kind that has not begun, and return at once."""
        with self._changed:
            self._tasks[kind] = task
            self._changed.notify()

    def close(self, timeout: float) -> None:
        """Do what is left, without pauses, for at most `timeout` seconds."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout)

    def _run(self) -> None:
        while True:
            with self._changed:
                while (kind := self._next()) is None:
                    if self._closing:
                        return
                    waiting = [self._not_before[kind] for kind in self._tasks]
                    self._changed.wait(max(min(waiting) - time.monotonic(), 0.0) if waiting else None)
                task = self._tasks.pop(kind)
            began = time.thread_time()
            try:
                task()
            except Exception as error:  # a table or a picture less must not end a training
                _log.warning("%s was not recorded: %s", kind, one_line(error))
            self._not_before[kind] = time.monotonic() + (time.thread_time() - began) / _SHARE

    def _next(self) -> str | None:
        now = time.monotonic()
        return next((kind for kind in self._tasks if self._closing or self._not_before[kind] <= now), None)

"""Background threads of tracking: metrics are sent, tables and pictures made, while training goes on."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from ssam_scale.tracking.store import one_line

_log = logging.getLogger(__name__)

# What MLflow takes in one request.
_BATCH = 1000
_LONGEST_PAUSE_S = 30.0


class MetricWriter:
    """Sends metrics in the order given, many in one request, and retries while the store does not answer.

    MLflow's own asynchronous logging starts twenty threads, may reorder, and drops what fails.

    Args:
        send: hands a list of at most 1000 metrics to the store; may raise.
        is_permanent: whether retrying after an error of `send` is useless; such metrics are dropped with a warning.
    """

    def __init__(self, send: Callable[[list[Any]], None], is_permanent: Callable[[Exception], bool]) -> None:
        self._send, self._is_permanent = send, is_permanent
        self._queue: deque[Any] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._deadline = float("inf")
        self._thread = threading.Thread(target=self._run, name="tracking", daemon=True)
        self._thread.start()

    def put(self, metrics: list[Any]) -> None:
        """Accept metrics and return at once."""
        with self._changed:
            self._queue.extend(metrics)
            self._changed.notify()

    def close(self, timeout: float) -> int:
        """Send what is left for at most `timeout` seconds; returns how many metrics could not be sent."""
        with self._changed:
            self._closing = True
            self._deadline = time.monotonic() + timeout
            self._changed.notify()
        self._thread.join(timeout)
        with self._changed:
            return len(self._queue)

    def _run(self) -> None:
        pause = 0.0
        while True:
            with self._changed:
                if pause:
                    self._changed.wait_for(lambda: self._closing, timeout=pause)
                self._changed.wait_for(lambda: self._queue or self._closing)
                batch = [self._queue[index] for index in range(min(len(self._queue), _BATCH))]
            if not batch:
                return
            try:
                self._send(batch)
                pause = 0.0
            except Exception as error:
                if not self._is_permanent(error):
                    if not pause:
                        _log.warning("tracking store does not answer, metrics wait: %s", one_line(error))
                    if time.monotonic() > self._deadline:
                        return
                    pause = min(max(1.0, 2 * pause), _LONGEST_PAUSE_S)
                    if self._closing:
                        time.sleep(0.2)  # the pause ends at once when closing; do not spin
                    continue
                _log.warning("tracking store refuses %d metrics: %s", len(batch), one_line(error))
            with self._changed:
                for _ in batch:
                    self._queue.popleft()


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

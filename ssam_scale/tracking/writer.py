"""Metrics on their way to the store, on a thread of their own: a slow or absent store never holds up a step."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from ssam_scale.tracking.store import one_line

_log = logging.getLogger(__name__)

# What MLflow takes in one request.
_BATCH = 1000
_LONGEST_PAUSE_S = 30.0


class MetricWriter:
    """Sends metrics in the order given, many in one request. What a store refuses for now is sent again later.

    MLflow's own asynchronous logging starts twenty threads, may reorder, and drops what fails.

    Args:
        send: hands a list of at most 1000 metrics to the store; may raise.
        lasting: whether an error of `send` would only repeat itself; such metrics are dropped with a warning.
    """

    def __init__(self, send: Callable[[list[Any]], None], lasting: Callable[[Exception], bool]) -> None:
        self._send, self._lasting = send, lasting
        self._queue: deque[Any] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._dead_line = float("inf")
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
            self._dead_line = time.monotonic() + timeout
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
                if not self._lasting(error):
                    if not pause:
                        _log.warning("tracking store does not answer, metrics wait: %s", one_line(error))
                    if time.monotonic() > self._dead_line:
                        return
                    pause = min(max(1.0, 2 * pause), _LONGEST_PAUSE_S)
                    if self._closing:
                        time.sleep(0.2)  # the pause ends at once when closing; do not spin
                    continue
                _log.warning("tracking store refuses %d metrics: %s", len(batch), one_line(error))
            with self._changed:
                for _ in batch:
                    self._queue.popleft()

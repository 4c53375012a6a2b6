"""Writing a checkpoint beside training, from a copy.

Of a ViT-B/16 and AdamW's state (991 MiB) training waits 0.3 to 0.4 s for the copy. Writing and digesting takes some 2 s
of a core beside it: where one is free a step is 1.1 times as long meanwhile, and where all compute those seconds are
training's (two cores of an AMD EPYC; `benchmarks/checkpoint_delay.py`). A lower priority of the thread only spreads
them: with a tenth of a core's share a checkpoint took six times as long, and training lost as much.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class BackgroundWriter:
    """Does one thing after another in a thread of its own, which the process waits for when it ends.

    Attributes:
        seconds: how long the last one took.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._thread: threading.Thread | None = None
        self._failure = ""

    def start(self, work: Callable[[], str]) -> None:
        """Begin `work`, which returns the message of a failure, or none; after what was begun before.

        Args:
            work: raises nothing.
        """
        self._failure = self.wait()

        def timed() -> None:
            began = time.monotonic()
            self._failure = work() or self._failure
            self.seconds = time.monotonic() - began

        self._thread = threading.Thread(target=timed, name="checkpoint")
        self._thread.start()

    def failure(self) -> str:
        """The message of a failure of what has ended; empty if there is none. Does not wait."""
        return "" if self._thread is not None and self._thread.is_alive() else self._failure

    def wait(self) -> str:
        """The message of a failure of all that was begun; empty if there is none."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        return self._failure

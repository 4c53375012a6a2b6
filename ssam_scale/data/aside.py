"""Work on batches beside the training step: on a stream of its own on CUDA, and at once on the CPU."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


class Aside:
    """Copies and prepares batches while the device is still at the steps before.

    What is launched inside of `with aside:` goes to its own stream. What it made is handed over before it is used, for
    which the stream that uses it waits, and not the host.

    Args:
        device: where the work runs.

    Attributes:
        overlaps: whether there is such a stream.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._copied: torch.cuda.Event | None = None
        self.overlaps = self._stream is not None
        self._within: list[AbstractContextManager[object]] = []

    def __enter__(self) -> Aside:
        within = nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
        within.__enter__()
        self._within.append(within)
        return self

    def __exit__(self, *exception: object) -> None:
        self._within.pop().__exit__(*exception)  # type: ignore[arg-type]

    def follow(self) -> None:
        """What comes next on the stream of its own comes after all that the current one was given."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def hand_over(self, tensors: Iterable[Tensor]) -> None:
        """What comes next on the current stream may use `tensors`, which were made aside."""
        if self._stream is None:
            return
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        for t in tensors:
            t.record_stream(current)  # its memory is the other stream's, which must not take it back too early

    def note_copies(self) -> None:
        """Copies that were launched inside until now are those that `wait_for_copies` waits for."""
        if self._stream is not None:
            self._copied = torch.cuda.Event()
            self._copied.record(self._stream)

    def wait_for_copies(self) -> None:
        """The host may write again to what was copied from. The copies are long over where a step came in between."""
        if self._copied is not None and not self._copied.query():
            self._copied.synchronize()
        self._copied = None

"""Reading touches no GPU but the process's own, and none where the process computes on the CPU.

FFCV's thread would enter streams, which takes it to device 0, whatever the process computes on: half a gigabyte of
GPU 0 for each other process of the machine. Stand-ins for `torch.cuda` write down which thread is on which device.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ffcv.loader import epoch_iterator

from ssam_scale.data import ffcv_import, inspect
from ssam_scale.data.ffcv_loader import Reader, SharedOrder, View
from ssam_scale.data.order import RandomOrder


class PretendedGPUs:
    """What `torch.cuda` does to devices: each thread begins on device 0, and whatever it does happens on its device."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, int]] = []  # thread, what, device
        self.initialised = False
        self._current = threading.local()

    @property
    def device(self) -> int:
        return getattr(self._current, "device", 0)

    def called(self, what: str, device: int | None = None) -> None:
        thread = "main" if threading.current_thread() is threading.main_thread() else "another"
        self.calls.append((thread, what, self.device if device is None else device))
        self.initialised = True

    @contextmanager
    def on(self, device: int) -> Iterator[None]:
        before, self._current.device = self.device, device
        yield
        self._current.device = before

    def put_in(self, patch: pytest.MonkeyPatch) -> None:
        """In the place of `torch.cuda`, and FFCV as it is where torch sees GPUs."""
        gpus = self

        class Stream:
            def __init__(self, device: int | None = None) -> None:
                self.device = gpus.device if device is None else device
                gpus.called("Stream", self.device)

            def wait_stream(self, other: Any) -> None: ...

        class Event:
            def record(self, stream: Stream) -> None:
                gpus.called("Event.record", stream.device)

            def wait(self) -> None:
                gpus.called("Event.wait")

        @contextmanager
        def entered(stream: Stream) -> Iterator[None]:
            gpus.called("stream")  # what was current is asked for, and made current again afterwards
            with gpus.on(stream.device):
                yield
            gpus.called("stream")

        def pinned(tensor: torch.Tensor, *_: Any) -> torch.Tensor:
            gpus.called("pin_memory")
            return tensor

        stand_ins = {
            "is_available": lambda: True,
            "is_initialized": lambda: self.initialised,
            "Stream": Stream,
            "Event": Event,
            "stream": entered,
            "device": self.on,
            "current_stream": lambda device=None: Stream(device),
        }
        for name, stand_in in stand_ins.items():
            patch.setattr(torch.cuda, name, stand_in)
        patch.setattr(torch.Tensor, "pin_memory", pinned)
        patch.setattr(epoch_iterator, "IS_CUDA", True)  # found out when it is imported
        importlib.reload(ffcv_import)


@pytest.mark.parametrize("device", [None, 0, 3])
def test_its_thread_stays_off_all_devices_and_buffers_are_pinned_for_the_process_s_own(
    numbered: Path, device: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus = PretendedGPUs()
    gpus.put_in(monkeypatch)
    gpus.initialised = device is not None  # by whoever computes there
    reader = Reader(inspect(numbered), View(24, True), SharedOrder(RandomOrder(np.arange(48), 0), 0, 1, 4), 4, 2)
    with gpus.on(device or 0):
        epoch = reader.start(0)
        batches = 0
        while (item := reader.next_batch(epoch)) is not None:
            batches += 1
            assert item[0].shape == (4, 24, 24, 3)
        epoch.stop()
    assert batches == 12
    assert set(gpus.calls) == (set() if device is None else {("main", "pin_memory", device)})

"""What a process's device has taken: the peak of memory, and energy where NVML tells it."""

from __future__ import annotations

import logging
import math
import resource
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_log = logging.getLogger(__name__)


def peak_bytes(device: torch.device) -> float:
    """The most memory that this process has had at once: torch's on CUDA since `forget_peak`, else resident, ever."""
    if device.type == "cuda":
        import torch

        return float(torch.cuda.max_memory_allocated(device))
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # Linux counts it in KiB


def forget_peak(device: torch.device) -> None:
    """Begin anew, where that can be done: what was needed until now is none of training."""
    if device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)


class EnergyMeter:
    """Joules of the GPU that a process computes on, by NVML's counter (Volta and later; not of a part of a card).

    Args:
        device: that this process computes on.
    """

    def __init__(self, device: torch.device) -> None:
        self._nvml: Any = None
        self._began = math.nan
        if device.type == "cuda":
            self._open(device)

    def begin(self) -> None:
        """From here on."""
        self._began = self._read()

    def joules(self) -> float:
        """Since `begin`; not a number where it is not known."""
        return self._read() - self._began

    def _open(self, device: torch.device) -> None:
        import torch

        try:
            import pynvml

            pynvml.nvmlInit()
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        except Exception as error:  # the package or the driver is missing, or the card is shared out
            _log.debug("energy is not measured: %s", error)
        else:
            self._nvml = pynvml

    def _read(self) -> float:
        if self._nvml is None:
            return math.nan
        try:
            return self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1000.0
        except self._nvml.NVMLError:
            return math.nan

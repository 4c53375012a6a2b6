"""A machine with as many GPUs as a test wants: what torch finds, what lies in /dev, what the environment says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ssam_scale.sharding import device as chosen

_OF_A_PLACE = (
    "CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE",
    "MASTER_ADDR", "MASTER_PORT",
    "SLURM_GPUS_ON_NODE", "SLURM_JOB_GPUS", "SLURM_STEP_GPUS", "SLURM_STEP_NUM_TASKS",
    "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "FLUX_JOB_SIZE", "JSM_NAMESPACE_SIZE",
    "PMIX_RANK", "ALPS_APP_PE", "PALS_RANKID",
)  # fmt: skip


class Machine:
    """Pretends to be a machine: what torch finds, what lies in /dev, what the environment says."""

    def __init__(self, patch: pytest.MonkeyPatch, dev: Path) -> None:
        self._patch, self._dev = patch, dev
        self.set_devices: list[torch.device] = []
        for name in _OF_A_PLACE:
            patch.delenv(name, raising=False)
        patch.setattr(chosen, "_DEVICE_FILES", dev)
        patch.setattr(torch.cuda, "set_device", self.set_devices.append)
        self.has(gpus=0, seen=0)

    def has(self, *, gpus: int, seen: int, cuda: str | None = "12.8", why: str | None = None) -> None:
        """So many GPUs, of which torch, built for this CUDA, sees some; if none, then why."""
        for old in self._dev.iterdir():
            old.unlink()
        for name in [*(f"nvidia{number}" for number in range(gpus)), *(["nvidiactl"] if gpus else [])]:
            (self._dev / name).touch()

        def init() -> None:
            if why is not None:
                raise RuntimeError(why)

        self._patch.setattr(torch.version, "cuda", cuda)
        self._patch.setattr(torch.version, "hip", None)
        self._patch.setattr(torch.cuda, "is_available", lambda: seen > 0)
        self._patch.setattr(torch.cuda, "device_count", lambda: seen)
        self._patch.setattr(torch.cuda, "init", init)

    def has_models(self, name: str, capability: tuple[int, int]) -> None:
        """The GPUs are of this name and compute capability; torch can pretend bf16 on any of them."""
        properties = SimpleNamespace(name=name, major=capability[0], minor=capability[1])
        stand_ins: dict[str, Any] = {
            "current_device": lambda: 0,
            "device": _entered,
            "get_device_properties": lambda device=None: properties,
            "get_device_capability": lambda device=None: capability,
            "get_device_name": lambda device=None: name,
            "_check_bf16_tensor_supported": lambda device: True,
        }
        for function, stand_in in stand_ins.items():
            self._patch.setattr(torch.cuda, function, stand_in)

    def says(self, **environment: str) -> None:
        for name, value in environment.items():
            self._patch.setenv(name, value)


@contextmanager
def _entered(device: Any) -> Iterator[None]:
    yield

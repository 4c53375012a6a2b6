"""Real processes joined by gloo: the harness of everything that must hold on N ranks."""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from ssam_scale.sharding import World, join_world
from tests.support.processes import free_port

# Importing takes longer than much of what the processes do.
_PRELOAD = [
    "torch._dynamo",
    "torch.distributed.checkpoint.state_dict",
    "ssam_scale.models",
    "ssam_scale.perturbation",
    "ssam_scale.sharding.zero",
]


def _start_method() -> str:
    """Processes are forks of one that has imported what they need, or, where there is a GPU, start afresh.

    A process that might have touched a GPU's driver must not be forked.
    """
    if torch.cuda.is_available():
        return "spawn"
    mp.set_forkserver_preload(_PRELOAD)
    return "forkserver"


def _entry(rank: int, function: Callable[..., Any], size: int, port: int, folder: str, args: tuple[Any, ...]) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    try:
        with join_world() as world:
            result = function(world, *args)
            torch.save(result, Path(folder) / f"{rank}.pt")
            del result
    except BaseException:
        traceback.print_exc()
        raise


def run_ranks(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """`function(world, *args)` on `size` new processes; their results (tensors in plain containers), by rank."""
    with tempfile.TemporaryDirectory() as folder:
        given = (function, size, free_port(), folder, args)
        mp.start_processes(_entry, given, nprocs=size, start_method=_start_method())
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(size)]


def alone(function: Callable[..., Any], *args: Any) -> Any:
    """`function(world, *args)` in this process, without any process group."""
    return function(World(), *args)

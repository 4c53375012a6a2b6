"""Which backend a model is on, and putting a model on one: `sharding_of` reads it off, `place` makes it so."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from .ddp import DDP, without_buffer_sync
from .fsdp import FSDP2, shard_fsdp2
from .interface import Sharding
from .unsharded import Single
from .world import World

Backend = Literal["single", "ddp", "fsdp2", "zero0", "zero1", "zero2", "zero3"]


def sharding_of(module: nn.Module) -> Sharding:
    """How `module`'s weights are distributed, read off the module itself.

    Args:
        module: a plain module, a `DistributedDataParallel`, the root that `fully_shard` was called on, or a
            `DeepSpeedEngine`.

    Raises:
        ValueError: submodules are sharded but `module` is not the root of them, or the layout is not supported.
        RuntimeError: a DeepSpeed engine of a DeepSpeed whose internals are not known.
    """
    # Importing DeepSpeed takes seconds, and whoever has an engine has imported it.
    if (deepspeed := sys.modules.get("deepspeed")) is not None and isinstance(module, deepspeed.DeepSpeedEngine):
        from .zero import zero_sharding

        return zero_sharding(module)
    if isinstance(module, DistributedDataParallel):
        return DDP(module)
    if isinstance(module, FSDPModule):
        return FSDP2(module)
    inside = next((name for name, m in module.named_modules() if isinstance(m, FSDPModule)), None)
    if inside is not None:
        raise ValueError(
            f"submodule {inside} is sharded by FSDP2 but the model itself is not: call fully_shard on it too"
        )
    return Single(module)


def distribute(
    module: nn.Module,
    blocks: Sequence[nn.Module],
    backend: Literal["single", "ddp", "fsdp2"],
    world: World,
    replicas: int = 1,
) -> nn.Module:
    """Distribute `module` over the processes of `world`: the returned module is the one to train.

    Args:
        module: the model, identically initialised on every process; moved to the world's device.
        blocks: submodules that FSDP2 gathers and frees as one unit.
        backend: how.
        world: over whom.
        replicas: copies of the weights that FSDP2 keeps, each spread over world size / replicas processes (HSDP).

    Raises:
        ValueError: the backend or the number of replicas does not go with the number of processes.
    """
    _check_replicas(backend, replicas)
    if backend == "single" and world.size > 1:
        raise ValueError(f"backend single on {world.size} processes; use ddp or fsdp2")
    if backend != "single" and not dist.is_initialized():
        raise ValueError(f"backend {backend} without a launcher; use single, or start the processes with torchrun")
    module = module.to(world.device)
    if backend == "single":
        return module
    if backend == "ddp":
        ids = [world.device.index] if world.device.type == "cuda" else None
        return DistributedDataParallel(module, device_ids=ids, **without_buffer_sync())
    return shard_fsdp2(module, blocks, world.device, replicas)


def place(
    module: nn.Module,
    blocks: Sequence[nn.Module],
    backend: Backend,
    world: World,
    make_optimizer: Callable[[], torch.optim.Optimizer],
    *,
    replicas: int = 1,
    batch_size: int = 1,
    accumulation: int = 1,
    max_grad_norm: float | None = None,
    deepspeed: Mapping[str, Any] | None = None,
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Distribute `module` and build its optimizer, each when the backend needs it: what `SparseSAM` is given.

    Args:
        module: the model, identically initialised on every process; moved to the world's device.
        blocks: submodules that FSDP2 gathers and frees as one unit.
        backend: how.
        world: over whom.
        make_optimizer: builds the base optimizer over the module's parameters, as they are when it is called.
        replicas: copies of the weights that FSDP2 keeps, as `distribute` takes it.
        batch_size: samples of one micro-batch on one process; DeepSpeed wants to know.
        accumulation: micro-batches in one step; DeepSpeed wants to know.
        max_grad_norm: what the descent gradient will be clipped to; DeepSpeed clips itself.
        deepspeed: sections of DeepSpeed's configuration beside those that say the same as the other arguments.

    Raises:
        ValueError: the backend or the number of replicas does not go with the number of processes, or DeepSpeed does
            not take its configuration.
    """
    if not backend.startswith("zero"):
        placed = distribute(module, blocks, backend, world, replicas)  # type: ignore[arg-type]
        return placed, make_optimizer()
    _check_replicas(backend, replicas)
    if not dist.is_initialized():
        raise ValueError(
            f"backend {backend} without a launcher; use single, or start the processes with deepspeed or torchrun"
        )
    from .zero.engine import zero_engine

    module = module.to(world.device)
    optimizer = make_optimizer()
    engine = zero_engine(
        module,
        optimizer,
        int(backend[-1]),
        batch_size=batch_size,
        accumulation=accumulation,
        max_grad_norm=max_grad_norm,
        config=deepspeed,
    )
    return engine, optimizer


def _check_replicas(backend: Backend, replicas: int) -> None:
    if replicas < 1:
        raise ValueError(f"replicas is {replicas}; at least 1 is needed")
    if replicas > 1 and backend != "fsdp2":
        raise ValueError(
            f"{replicas} replicas with backend {backend}; only fsdp2 spreads several copies of the weights"
        )

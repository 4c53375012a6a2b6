"""Where the weights live: one file a backend behind one interface."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from .base import Shard, Sharding
from .ddp import DDP, without_buffer_sync
from .fsdp import FSDP2, shard_fsdp2
from .single import Single
from .world import World, join_world

__all__ = ["Shard", "Sharding", "World", "distribute", "join_world", "sharding_of"]


def sharding_of(module: nn.Module) -> Sharding:
    """How `module`'s weights are distributed, read off the module itself.

    Args:
        module: a plain module, a `DistributedDataParallel`, or the root that `fully_shard` was called on.

    Raises:
        ValueError: submodules are sharded but `module` is not the root of them, or the layout is not supported.
    """
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
) -> nn.Module:
    """Distribute `module` over the processes of `world`: the returned module is the one to train.

    Args:
        module: the model, identically initialised on every process; moved to the world's device.
        blocks: submodules that FSDP2 gathers and frees as one unit.
        backend: how.
        world: over whom.

    Raises:
        ValueError: the backend does not go with the number of processes.
    """
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
    return shard_fsdp2(module, blocks, world.device)

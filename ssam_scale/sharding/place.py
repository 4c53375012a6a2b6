"""Which backend a model is on, and putting a model on one: `sharding_of` reads it off, `place` makes it so."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ssam_scale.torch_compat import new_groups_wait

from .device import to_device
from .interface import Sharding
from .registry import BACKENDS, MakeOptimizer, Options
from .unsharded import Single
from .unsupported import owner_of, refuse_unsupported
from .world import World


def sharding_of(module: nn.Module) -> Sharding:
    """How `module`'s weights are distributed, read off the module itself.

    Args:
        module: a plain module, a `DistributedDataParallel`, the root that `fully_shard` was called on, or a
            `DeepSpeedEngine`.

    Raises:
        ValueError: `module` is around what is distributed, or the layout is not supported.
        UnsupportedVersionError: a DeepSpeed engine of a DeepSpeed whose internals are not known.
    """
    refuse_unsupported(module)
    owner = owner_of(module)
    return Single(module) if owner is None else owner.sharding(module)


@contextmanager
def released(module: nn.Module) -> Iterator[None]:
    """For as long as `module` is used: afterwards its memory can be had for another one.

    A process may place several, one after another: a run that has to go back, or trains more parameters from an epoch
    on. After an error nothing is released, which could hide it.

    Args:
        module: what `place` returned.
    """
    yield
    if (owner := owner_of(module)) is not None:
        owner.release(module)


def place(
    module: nn.Module,
    blocks: Sequence[nn.Module],
    backend: str,
    world: World,
    make_optimizer: MakeOptimizer,
    *,
    replicas: int = 1,
    batch_size: int = 1,
    accumulation: int = 1,
    max_grad_norm: float | None = None,
    deepspeed: Mapping[str, Any] | None = None,
    precision: torch.dtype = torch.float32,
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Distribute `module` and build its optimizer, each when the backend needs it: what `SparseSAM` is given.

    Args:
        module: the model, identically initialised on every rank; moved to the world's device, on a GPU in
            channels_last where the backend takes it.
        blocks: submodules that FSDP2 gathers and frees as one unit.
        backend: name of a registered backend.
        world: over whom.
        make_optimizer: builds the base optimizer over the module's parameters, as they are when it is called.
        replicas: copies of the weights that FSDP2 keeps, each sharded over world size / replicas ranks (HSDP).
        batch_size: samples of one micro-batch on one rank; DeepSpeed wants to know.
        accumulation: micro-batches in one step; DeepSpeed wants to know.
        max_grad_norm: what the descent gradient will be clipped to; DeepSpeed clips itself.
        deepspeed: sections of DeepSpeed's configuration beside those that say the same as the other arguments.
        precision: of the autocast that every forward is going to run under; float32: there is none. What autocast would
            cast to bf16, a backend that gathers weights gathers in bf16 (`low_precision`).

    Raises:
        ValueError: there is no such backend, it or the number of replicas does not go with the number of processes, or
            DeepSpeed does not take its configuration.
        UserError: the backend needs DeepSpeed and there is none, or not one that is supported.
    """
    if backend not in BACKENDS:
        raise ValueError(f"there is no backend {backend!r}; there are {', '.join(sorted(BACKENDS))}")
    chosen = BACKENDS[backend].value
    if replicas < 1:
        raise ValueError(f"replicas is {replicas}; at least 1 is needed")
    if replicas > 1 and not chosen.has_replicas:
        able = " and ".join(name for name, other in BACKENDS.items() if other.value.has_replicas)
        raise ValueError(
            f"{replicas} replicas with backend {backend}; only {able} shards several copies of the weights"
        )
    if chosen.launchers is None and world.size > 1:
        raise ValueError(f"backend {backend} on {world.size} processes; use ddp or fsdp2")
    if chosen.launchers is not None and not dist.is_initialized():
        raise ValueError(
            f"backend {backend} without a launcher; use single, or start the processes with {chosen.launchers}"
        )
    options = Options(blocks, replicas, batch_size, accumulation, max_grad_norm, deepspeed or {}, precision)
    if chosen.any_memory_format:
        to_device(module, world.device)
    else:
        # Convolutions of a channels_last batch run in channels_last all the same, and convert their weights as they go.
        module.to(world.device).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    with new_groups_wait(world.timeout):
        return chosen.place(module, make_optimizer, world, options)

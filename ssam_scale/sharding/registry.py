"""The registry of backends: one entry for each way of distributing a model, made by the file that implements it.

A new backend is a module (or package) of this folder that registers in `BACKENDS`, a file in `costs/backends` and a
name in the configuration. None is listed anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import nn

from ssam_scale.registry import Registry

from .interface import Sharding
from .optimizer_trial import Handed
from .world import World

MakeOptimizer: TypeAlias = Callable[[], torch.optim.Optimizer]


@dataclass(frozen=True)
class Options:
    """What a backend may want to know about the training that a model is placed for.

    Attributes:
        blocks: submodules that are gathered and freed as one unit (FSDP2).
        replicas: copies of the weights, each sharded over world size / replicas ranks (HSDP).
        batch_size: samples of one micro-batch on one rank (DeepSpeed).
        accumulation: micro-batches in one step (DeepSpeed).
        max_grad_norm: what the descent gradient is clipped to (DeepSpeed clips itself).
        deepspeed: further sections of DeepSpeed's configuration.
        precision: of the autocast that forwards run under; float32: there is none. See `low_precision`.
    """

    blocks: Sequence[nn.Module] = ()
    replicas: int = 1
    batch_size: int = 1
    accumulation: int = 1
    max_grad_norm: float | None = None
    deepspeed: Mapping[str, Any] = field(default_factory=dict)
    precision: torch.dtype = torch.float32


@dataclass(frozen=True)
class Backend:
    """One way of distributing a model.

    Attributes:
        title: what people call it.
        owns: whether a module was placed on this backend, by us or by the user.
        sharding: the implementation for such a module. Raises ValueError where its layout is not supported.
        place: puts a module, which is on its device, on the backend and builds its optimizer, in the order that the
            backend needs. Returns what to train and the optimizer.
        launchers: what starts the processes; None: there is one process.
        hands: what the base optimizer is given to step.
        has_replicas: whether it takes `Options.replicas` above 1.
        any_memory_format: whether weights may be in channels_last; FSDP2 and DeepSpeed flatten them row by row.
        held_beside: given the number of weights and sections of DeepSpeed's configuration, bytes that a process holds
            at most beside a plain module's weights, gradients and optimizer state.
        release: undoes what would keep a module that is on this backend, and all that is with it, alive for ever.
    """

    title: str
    owns: Callable[[nn.Module], bool]
    sharding: Callable[[Any], Sharding]
    place: Callable[[nn.Module, MakeOptimizer, World, Options], tuple[nn.Module, torch.optim.Optimizer]]
    launchers: str | None = "torchrun"
    hands: Handed = "tensors"
    has_replicas: bool = False
    any_memory_format: bool = False
    held_beside: Callable[[int, Mapping[str, Any]], int] = lambda weights, deepspeed: 0
    release: Callable[[Any], None] = lambda module: None

    @property
    def shards_weights(self) -> bool:
        """Whether each rank perturbs and steps only a shard of the weights, and not all of them."""
        return self.hands != "tensors"


BACKENDS: Registry[Backend] = Registry("ssam_scale.sharding")
"""By `sharding.backend`. Looking at it imports all modules of this folder, but not DeepSpeed."""

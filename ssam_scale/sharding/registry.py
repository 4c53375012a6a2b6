"""The registry of backends: one entry for each way of distributing a model, made by the file that implements it.

A new backend is a module (or package) of this folder that calls `register`, a file in `costs/backends` and a name in
the configuration. Modules are found by `backends`; none is listed anywhere.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import nn

from .interface import Sharding
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
    """

    blocks: Sequence[nn.Module] = ()
    replicas: int = 1
    batch_size: int = 1
    accumulation: int = 1
    max_grad_norm: float | None = None
    deepspeed: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class BackendInfo:
    """What a table of backends shows.

    Attributes:
        name: as the configuration has it.
        summary: one line.
        source: the library, and the paper.
    """

    name: str
    summary: str
    source: str


@dataclass(frozen=True)
class Backend(BackendInfo):
    """One way of distributing a model.

    Attributes:
        owns: whether a module was placed on this backend, by us or by the user.
        sharding: the implementation for such a module. Raises ValueError where its layout is not supported.
        place: puts a module, which is on its device, on the backend and builds its optimizer, in the order that the
            backend needs. Returns what to train and the optimizer.
        launchers: what starts the processes; None: there is one process.
        shards_weights: whether each rank perturbs and steps only a shard of the weights, and not all of them.
        has_replicas: whether it takes `Options.replicas` above 1.
    """

    owns: Callable[[nn.Module], bool]
    sharding: Callable[[Any], Sharding]
    place: Callable[[nn.Module, MakeOptimizer, World, Options], tuple[nn.Module, torch.optim.Optimizer]]
    launchers: str | None = "torchrun"
    shards_weights: bool = True
    has_replicas: bool = False


_REGISTERED: dict[str, Backend] = {}


def register(backend: Backend) -> None:
    """Make a backend known, under its name."""
    assert backend.name not in _REGISTERED, f"two backends are called {backend.name}"
    _REGISTERED[backend.name] = backend


@cache
def backends() -> Mapping[str, Backend]:
    """Every backend by name. Imports all modules of this folder, but not DeepSpeed."""
    for module in pkgutil.iter_modules(importlib.import_module(__package__).__path__):
        importlib.import_module(f"{__package__}.{module.name}")
    return MappingProxyType(dict(sorted(_REGISTERED.items())))

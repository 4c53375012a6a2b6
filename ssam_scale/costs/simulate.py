"""One rank of a large job, run alone on torch's fake process group: what it holds in memory and what it sends.

torch's fake process group stands for the network: every collective returns at once, and what it leaves behind are not
the values that other processes would have sent. So nothing can be learned of losses or times, but what the process
holds, which collectives it calls, and on how much, is what it would be among the others.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ssam_scale.masks import BitMask, Layout, Plan, Rows, Subset, pack, unpack
from ssam_scale.perturbation import SparseSAM
from ssam_scale.sharding import World, leave_process_group
from ssam_scale.sharding.collectives import COLLECTIVES, Traffic

_LARGEST = 1e3


@contextmanager
def fake_world(size: int) -> Iterator[World]:
    """A world of so many processes on the CPU, of which this one is the first and no other exists.

    Args:
        size: number of processes.

    Raises:
        ValueError: this process is in a process group already.
    """
    # Only here: importing it makes the backend "fake" known.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise ValueError("this process is one of a real process group; run it alone")
    dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    before = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = "0"  # DeepSpeed looks there, and nowhere else
    try:
        yield World(0, size, torch.device("cpu"))
    finally:
        if before is None:
            del os.environ["LOCAL_RANK"]
        else:
            os.environ["LOCAL_RANK"] = before
        leave_process_group()


class _Harmless(TorchDispatchMode):
    """Where others would have sent something, there are numbers that a weight or gradient may have.

    Else what happens to lie in memory is there, and DeepSpeed does not step where a gradient is not finite.
    """

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes back as operators on plain tensors
        result = func(*args, **(kwargs or {}))
        if getattr(func, "namespace", None) in COLLECTIVES:
            for t in tree_leaves((args, kwargs, result)):
                if isinstance(t, Tensor) and t.is_floating_point():
                    t.masked_fill_(~(t.abs() < _LARGEST), 0.0)
        return result


class GivenPlan:
    """A mask that perturbs what a plan of one process with all of the weights does, on any process of many.

    A choice by scores asks all processes for theirs, and there are none.

    Args:
        plan: with parts of whole parameters.

    Attributes:
        lengths: elements of this process's shards, by name; to be filled in once the weights are sharded.
    """

    def __init__(self, plan: Plan) -> None:
        self._whole = plan
        self.lengths: dict[str, int] = {}
        self._mine: Plan | None = None

    def check(self, layout: Layout) -> None:
        """Every model will do that the plan was made for."""

    def plan(self, layout: Layout, step: int) -> Plan:
        """The same in every step."""
        if self._mine is None:
            weights = {
                name: None if part is None else _slice(part, layout.starts[name], self.lengths[name])
                for name, part in self._whole.weights.items()
            }
            self._mine = replace(self._whole, weights=weights, full=self._whole.weights)
        return self._mine


def _slice(part: Subset, start: int, length: int) -> Subset:
    if isinstance(part, Rows):
        return Rows(part.keep, part.size, start, length, torch.device("cpu"))
    assert isinstance(part, BitMask)
    return BitMask(pack(unpack(part.packed)[start : start + length]), length)


@dataclass(frozen=True)
class Simulated:
    """What one process did in a step.

    Attributes:
        sent: bytes by collective, as `traffic` counts them.
        weights: bytes of the weights that it holds, and of copies that the optimizer steps instead of them.
        optimizer: bytes of the base optimizer's state.
        mask: bytes of the mask, of others' parts of it, and of what is sent of buffers of gradients.
    """

    sent: dict[str, float]
    weights: int
    optimizer: int
    mask: int


def simulate(opt: SparseSAM, loss_fn: Callable[..., Tensor], *batches: tuple[Tensor, Tensor]) -> Simulated:
    """Take steps with `opt`, and count in the last of them.

    Args:
        opt: inside of `fake_world`.
        loss_fn: as `SparseSAM.step` takes it.
        batches: this process's micro-batches.
    """
    parameters = list(opt.parameters.by_name.values())
    shards = opt.sharding.shards(parameters)
    if isinstance(opt.mask, GivenPlan):
        opt.mask.lengths.update(
            (name, s.weight.numel()) for name, s in zip(opt.parameters.by_name, shards, strict=True)
        )
    module = opt.sharding.descent_module
    if isinstance(module, DistributedDataParallel):
        module.register_comm_hook(None, lambda state, bucket: _all_reduce(bucket))  # refuses postponed annotations
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of gradients that are not finite, which here mean nothing
        for _ in range(3):  # DDP settles its buckets in the first two
            with _Harmless(), Traffic() as traffic:
                opt.step(loss_fn, *batches)
    states = (t for state in opt.base_optimizer.state.values() for t in state.values() if isinstance(t, Tensor))
    masks: list[Subset | None] = []
    if any(opt.radii):
        masks += opt.plan.weights.values()
        if opt.sharding.shard_group.size > 1 and opt.plan.full is not None:
            masks += opt.plan.full.values()
    packings = getattr(opt.sharding, "packings", None)
    held = [p for p in opt.sharding.resident(list(opt.sharding.network.parameters())) if p.numel()]
    own = {p.untyped_storage().data_ptr() for p in held}
    stepped = [p for p in opt.base_optimizer.state if _local(p).untyped_storage().data_ptr() not in own]
    return Simulated(
        dict(traffic.bytes),
        sum(p.nbytes for p in (*held, *stepped)),
        sum(_local(t).nbytes for t in states if t.ndim),
        sum(m.packed.nbytes for m in masks if isinstance(m, BitMask)) + (packings.bits // 8 if packings else 0),
    )


def _all_reduce(bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """What DDP does by itself, except that it expects a result of the collective, and a fake process group has none."""
    dist.all_reduce(bucket.buffer())
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def _local(tensor: Tensor) -> Tensor:
    local = getattr(tensor, "to_local", None)
    return tensor if local is None else local()

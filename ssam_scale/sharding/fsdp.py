"""FSDP2: every parameter is split along its first dimension over the processes of a mesh."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as ShardPlacement

from .base import Autograd, Shard, all_gather_samples


class FSDP2(Autograd):
    """A root module on which `fully_shard` was called.

    The step writes to the local shards behind FSDP's back, so a module that still holds gathered weights (the root
    keeps them between forwards) would go on computing with old ones: `publish` frees every gathered copy.

    Raises:
        ValueError: a parameter is not split along dimension 0 of a one-dimensional mesh.
    """

    def __init__(self, module: nn.Module) -> None:
        self.network = self.ascent_module = self.descent_module = module
        self._units = [m for m in module.modules() if isinstance(m, FSDPModule)]
        self.forget_copies()  # after a forward without a backward the root shows its gathered weights as its parameters
        meshes = set()
        for name, p in module.named_parameters():
            if not isinstance(p, DTensor) or p.device_mesh.ndim != 1 or p.placements != (ShardPlacement(0),):
                where = (
                    f"{p.placements} on mesh {tuple(p.device_mesh.shape)}" if isinstance(p, DTensor) else "not sharded"
                )
                raise ValueError(f"parameter {name} is {where}; supported is Shard(0) on a one-dimensional mesh")
            meshes.add(p.device_mesh)
        if len(meshes) != 1:
            raise ValueError(f"the model's parameters lie on {len(meshes)} meshes; supported is one")
        self._mesh: DeviceMesh = meshes.pop()
        self.shards_each = self._mesh.size()
        self.shard_index = self._mesh.get_local_rank()

    def shards(self, parameters: Sequence[nn.Parameter]) -> list[Shard]:
        """The local rows of each parameter."""
        result = []
        for p in parameters:
            rows, row_size = p.shape[0] if p.ndim else 1, math.prod(p.shape[1:])
            # FSDP2 splits like torch.chunk: equal parts, the last ones short or empty.
            start = min(self.shard_index * -(-rows // self.shards_each), rows) * row_size
            result.append(Shard(_local(p), start, p.numel()))
        return result

    def gradients(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """The local rows of each parameter's reduced gradient."""
        return [torch.zeros_like(_local(p)) if p.grad is None else _local(p.grad) for p in parameters]

    def reduce_ascent(self, parameters: Sequence[nn.Parameter]) -> None:
        """FSDP reduced them during the backward, and only those that a pass left a gradient for."""

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """Gradients stay unsharded until the last micro-batch."""
        root = self._units[0]
        root.set_requires_gradient_sync(last)
        try:
            yield
        finally:
            root.set_requires_gradient_sync(True)

    def sum_over_shards(self, value: Tensor) -> Tensor:
        """An all-reduce over the mesh."""
        dist.all_reduce(value, group=self._mesh.get_group())
        return value

    def gather_samples(self, samples: Tensor) -> Tensor:
        """An all-gather over the mesh."""
        return all_gather_samples(samples, self._mesh.get_group())

    def gather(self, parameter: nn.Parameter, local: Tensor) -> Tensor:
        """An all-gather over the mesh."""
        spread = DTensor.from_local(
            local,
            self._mesh,
            (ShardPlacement(0),),
            run_check=False,
            shape=parameter.shape,
            stride=torch.empty(parameter.shape, device="meta").stride(),
        )
        return spread.full_tensor()

    def scatter(self, parameter: nn.Parameter, whole: Tensor) -> Tensor:
        """The local rows."""
        start = self.shards([parameter])[0].start
        local = _local(parameter)
        return whole.reshape(-1)[start : start + local.numel()].reshape(local.shape)

    def exposed(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """The local rows of each parameter."""
        return [_local(p) for p in parameters]

    def publish(self) -> None:
        """The next forward gathers the shards anew."""
        self.forget_copies()

    def forget_copies(self) -> None:
        """Free every gathered copy."""
        for unit in self._units:
            unit.reshard()


def _local(tensor: Tensor) -> Tensor:
    assert isinstance(tensor, DTensor)
    with torch.no_grad():
        return tensor.to_local()


def shard_fsdp2(module: nn.Module, blocks: Sequence[nn.Module], device: torch.device) -> nn.Module:
    """`fully_shard` each block and then `module` itself over all processes, in place.

    Args:
        module: the model on `device`, the same on every process.
        blocks: submodules that are gathered and freed as one unit.
        device: where the shards live.
    """
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    for block in blocks:
        if block is not module:
            fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)
    return module

"""Float32 master weights and flat shards: what ZeRO's stages share, and their checkpoints.

A checkpoint is the same as under every other backend. Of trained weights it holds the masters, which are the more
precise ones, and the optimizer's state, which DeepSpeed keeps by master.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ssam_scale.sharding.chunks import Chunk, SavedTensor, own_part, whole
from ssam_scale.sharding.interface import Shard, ShardedWeights
from ssam_scale.sharding.process_group import ProcessGroup

FLOAT = 4  # bytes


@dataclass(frozen=True)
class Master:
    """What the optimizer steps in the place of this rank's shard of one parameter.

    Attributes:
        tensor: what the optimizer was given, which keys its state; may hold shards of other parameters, too.
        start: where the shard begins in it.
        length: elements of the shard.
        group: index of the parameter group.
    """

    tensor: Tensor
    start: int
    length: int
    group: int

    def shard(self, like: Tensor) -> Tensor:
        """The shard in `like`, which is shaped as `tensor`."""
        return like if self.length == like.numel() else like.narrow(0, self.start, self.length)


class HasMasters(ShardedWeights, Protocol):
    """A backend that perturbs the weights of the forward while the optimizer steps masters of them."""

    def groups(self) -> list[list[nn.Parameter]]:
        """The model's parameters that the optimizer steps, by group."""

    def master(self, parameter: nn.Parameter) -> Master:
        """What the optimizer steps in the place of `parameter`."""


class MasterState:
    """Saves and loads a backend that `HasMasters`, and says what its weights are rounded from."""

    def masters(self: HasMasters, parameters: Sequence[nn.Parameter]) -> list[Tensor] | None:
        """The masters, where the weights of the forward have fewer bits."""
        shards = [shard.weight for shard in self.shards(parameters)]
        if all(weight.element_size() >= FLOAT for weight in shards):
            return None
        found = [self.master(p) for p in parameters]
        return [m.shard(m.tensor.detach()).view(w.shape) for m, w in zip(found, shards, strict=True)]

    def optimizer_state_dict(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Refused: the optimizer does not know the model's parameters.

        Raises:
            RuntimeError: always; says what to call instead.
        """
        raise RuntimeError(
            "the optimizer's state belongs to the DeepSpeed engine: call engine.save_checkpoint(..., "
            "client_state=opt.sparse.state_dict()), and engine.load_checkpoint with opt.sparse.load_state_dict"
        )

    def load_optimizer_state_dict(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Refused, as `optimizer_state_dict`."""
        self.optimizer_state_dict(optimizer)

    def optimizer_entries(
        self: HasMasters, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], entry: str
    ) -> list[Tensor | None]:
        """By master, the run of each parameter's shard."""
        result: list[Tensor | None] = []
        for p in parameters:
            master = self.master(p)
            value = optimizer.state.get(master.tensor, {}).get(entry)
            result.append(None if value is None else master.shard(value))
        return result

    def named_model_state(self: HasMasters, network: nn.Module) -> dict[str, Tensor | Chunk]:
        """Of trained weights, their masters."""
        masters = _masters(self)
        weights: dict[str, Tensor | Chunk] = {}
        for name, t in network.state_dict(keep_vars=True).items():
            if (master := masters.get(id(t))) is not None:
                weights[name] = self.chunk(t, master.shard(master.tensor.detach()))
            elif isinstance(t, nn.Parameter):
                weights[name] = self.chunk(t, self.shards([t])[0].weight)
            else:
                weights[name] = t
        return weights

    @torch.no_grad()
    def load_named_model_state(self: HasMasters, network: nn.Module, state: Mapping[str, Tensor | SavedTensor]) -> None:
        """Writes both the masters and the weights of the forward."""
        masters = _masters(self)
        for name, t in network.state_dict(keep_vars=True).items():
            if isinstance(t, nn.Parameter):
                local = own_part(self, t, state[name])
                self.shards([t])[0].weight.copy_(local)
                if (master := masters.get(id(t))) is not None:
                    master.shard(master.tensor).copy_(local)
            else:
                t.copy_(whole(state[name]))
        self.publish()

    def named_optimizer_state(self: HasMasters, network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """By master, the run of each parameter's shard."""
        masters = _masters(self)
        state: dict[str, dict[str, Any]] = {}
        groups = [{**group, "params": []} for group in optimizer.param_groups]
        for name, p in network.named_parameters():
            if (master := masters.get(id(p))) is None:
                continue
            groups[master.group]["params"].append(name)
            state[name] = {
                # What is shaped like the master belongs to single weights, anything else to all of them (a step count).
                entry: self.chunk(p, master.shard(value))
                if isinstance(value, Tensor) and value.shape == master.tensor.shape
                else value
                for entry, value in optimizer.state.get(master.tensor, {}).items()
            }
        return {"state": state, "param_groups": groups}

    @torch.no_grad()
    def load_named_optimizer_state(
        self: HasMasters, network: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
    ) -> None:
        """Writes the state of the masters."""
        masters = _masters(self)
        group_of = {name: group for group in state["param_groups"] for name in group["params"]}
        for name, p in network.named_parameters():
            if (master := masters.get(id(p))) is None:
                continue
            mine = optimizer.state[master.tensor]
            for entry, value in state["state"].get(name, {}).items():
                if getattr(value, "shape", None) == self.full_shape(p):
                    mine.setdefault(entry, torch.zeros_like(master.tensor, dtype=value.dtype, requires_grad=False))
                    master.shard(mine[entry]).copy_(own_part(self, p, value))
                else:
                    mine[entry] = whole(value)
            saved = group_of[name].items()
            optimizer.param_groups[master.group].update({key: value for key, value in saved if key != "params"})


def _masters(sharding: HasMasters) -> dict[int, Master]:
    """The master of each trained parameter, by the parameter's `id`."""
    return {id(p): sharding.master(p) for group in sharding.groups() for p in group}


class _HasShards(Protocol):
    shard_group: ProcessGroup

    def shards(self, parameters: Sequence[nn.Parameter]) -> list[Shard]: ...

    def full_shape(self, parameter: nn.Parameter) -> torch.Size: ...

    def gather(self, parameter: nn.Parameter, local: Tensor) -> Tensor: ...


class FlatShards:
    """What ZeRO's stages 1 to 3 share: a shard is one run of a row-major parameter, over all ranks."""

    weights_replicated = False

    def __init__(self) -> None:
        self.shard_group = ProcessGroup(dist.group.WORLD)

    def gather(self: _HasShards, parameter: nn.Parameter, local: Tensor) -> Tensor:
        """An all-reduce of the full tensor, which is zero outside of this rank's run."""
        [shard] = self.shards([parameter])
        dtype = torch.uint8 if local.dtype == torch.bool else local.dtype
        full = torch.zeros(shard.numel, dtype=dtype, device=local.device)
        full[shard.start : shard.start + local.numel()] = local.to(dtype)
        return self.shard_group.all_reduce(full).to(local.dtype).reshape(self.full_shape(parameter))

    def chunk(self: _HasShards, parameter: nn.Parameter, local: Tensor) -> Tensor | Chunk:
        """This rank's run."""
        [shard], shape = self.shards([parameter]), self.full_shape(parameter)
        if self.shard_group.size == 1:
            return local.reshape(shape)
        return Chunk(local, shard.start, shape, True, partial(self.gather, parameter, local))

    def scatter(self: _HasShards, parameter: nn.Parameter, full: Tensor) -> Tensor:
        """This rank's run."""
        [shard] = self.shards([parameter])
        return full.reshape(-1)[shard.start : shard.start + shard.weight.numel()]

    def resident(self: _HasShards, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """The shards: gathered copies of them are freed by `reshard`."""
        return [shard.weight for shard in self.shards(parameters)]

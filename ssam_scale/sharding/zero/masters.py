"""Weights of which the optimizer steps a copy: where its parts lie, and what a checkpoint holds of them.

A checkpoint is the same as everywhere else: the copy's weights, which are the more precise ones, and its state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ssam_scale.sharding.interface import Shard, Sharding


@dataclass(frozen=True)
class Master:
    """What the optimizer steps in the place of this process's part of one parameter.

    Attributes:
        tensor: what the optimizer was given, which its state has as key; may hold parts of other parameters, too.
        start: where the part begins in it.
        length: elements of the part.
        group: index of the parameter group.
    """

    tensor: Tensor
    start: int
    length: int
    group: int

    def part(self, like: Tensor) -> Tensor:
        """The part of this parameter in `like`, which is shaped as `tensor`."""
        return like if self.length == like.numel() else like.narrow(0, self.start, self.length)


class HasMasters(Sharding, Protocol):
    """A backend that perturbs one copy of the weights while the optimizer steps another."""

    def groups(self) -> list[list[nn.Parameter]]:
        """The model's parameters that the optimizer steps, by group."""

    def master(self, parameter: nn.Parameter) -> Master:
        """What the optimizer steps in the place of `parameter`."""


class MasterWeights:
    """Checkpoints of a backend that `HasMasters`."""

    def state_dict(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Refused: the optimizer does not know the model's parameters.

        Raises:
            RuntimeError: always; says what to call instead.
        """
        raise RuntimeError(
            "the optimizer's state belongs to the DeepSpeed engine: call engine.save_checkpoint(..., "
            "client_state=opt.sparse_state()), and engine.load_checkpoint with opt.load_sparse_state"
        )

    def load_state_dict(self: Sharding, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Refused, as `state_dict`."""
        self.state_dict(optimizer)

    def whole_state(
        self: HasMasters, network: nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Gathers one tensor after the other; of trained weights, what the optimizer steps."""
        masters = {id(p): self.master(p) for group in self.groups() for p in group}
        weights = {}
        for name, t in network.state_dict(keep_vars=True).items():
            if (master := masters.get(id(t))) is not None:
                weights[name] = self.gather(t, master.part(master.tensor.detach())).cpu().clone()
            elif isinstance(t, nn.Parameter):
                weights[name] = self.gather(t, self.shards([t])[0].weight).cpu().clone()
            else:
                weights[name] = t.cpu().clone()
        state: dict[str, dict[str, Any]] = {}
        groups = [{**group, "params": []} for group in optimizer.param_groups]
        for name, p in network.named_parameters():
            if (master := masters.get(id(p))) is None:
                continue
            groups[master.group]["params"].append(name)
            state[name] = {
                # What is shaped like the master belongs to single weights, anything else to all of them (a step count).
                entry: self.gather(p, master.part(value)).cpu().clone()
                if isinstance(value, Tensor) and value.shape == master.tensor.shape
                else value
                for entry, value in optimizer.state.get(master.tensor, {}).items()
            }
        return weights, {"state": state, "param_groups": groups}

    @torch.no_grad()
    def load_whole_state(
        self: HasMasters,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        weights: dict[str, Any],
        state: dict[str, Any],
    ) -> None:
        """Writes to what the optimizer steps and to what a forward reads."""
        for name, t in network.state_dict(keep_vars=True).items():
            if isinstance(t, nn.Parameter):
                self.shards([t])[0].weight.copy_(self.scatter(t, weights[name]))
            else:
                t.copy_(weights[name])
        group_of = {name: group for group in state["param_groups"] for name in group["params"]}
        trained = {id(p) for group in self.groups() for p in group}
        for name, p in network.named_parameters():
            if id(p) not in trained:
                continue
            master = self.master(p)
            master.part(master.tensor).copy_(self.scatter(p, weights[name]))
            mine = optimizer.state[master.tensor]
            for entry, value in state["state"].get(name, {}).items():
                if isinstance(value, Tensor) and value.shape == self.whole_shape(p):
                    mine.setdefault(entry, torch.zeros_like(master.tensor, dtype=value.dtype, requires_grad=False))
                    master.part(mine[entry]).copy_(self.scatter(p, value))
                else:
                    mine[entry] = value
            saved = group_of[name].items()
            optimizer.param_groups[master.group].update({key: value for key, value in saved if key != "params"})
        self.publish()


class FlatShards(MasterWeights):
    """What ZeRO's stages 1 to 3 have in common: a shard is one run of elements of a row-major parameter."""

    exposes_whole = False

    def __init__(self) -> None:
        self.shards_each, self.shard_index = dist.get_world_size(), dist.get_rank()

    def sum_over_shards(self, value: Tensor) -> Tensor:
        """An all-reduce over all processes."""
        dist.all_reduce(value)
        return value

    def gather(self: Sharding, parameter: nn.Parameter, local: Tensor) -> Tensor:
        """An all-reduce of the whole, which is zero outside of the local run."""
        [shard] = self.shards([parameter])
        return _gather_runs(shard, local).reshape(self.whole_shape(parameter))

    def scatter(self: Sharding, parameter: nn.Parameter, whole: Tensor) -> Tensor:
        """The local run."""
        [shard] = self.shards([parameter])
        return whole.reshape(-1)[shard.start : shard.start + shard.weight.numel()]

    def exposed(self: Sharding, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """The local runs: copies of them are made anew after `forget_copies`."""
        return [shard.weight for shard in self.shards(parameters)]


def _gather_runs(shard: Shard, local: Tensor) -> Tensor:
    dtype = torch.uint8 if local.dtype == torch.bool else local.dtype
    whole = torch.zeros(shard.numel, dtype=dtype, device=local.device)
    whole[shard.start : shard.start + local.numel()] = local.to(dtype)
    dist.all_reduce(whole)
    return whole.to(local.dtype)

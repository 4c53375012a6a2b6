"""One process that holds everything."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from .gradient_hooks import Take, taken
from .interface import Needed, Shard, Written
from .registry import Backend, MakeOptimizer, Options, register
from .world import Peers, World

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


class Autograd:
    """What backends have in common whose gradients are autograd's and whose weights are the optimizer's own."""

    takes_scaler = True
    exposes_whole = False
    packs = False

    def trained(
        self, optimizer: torch.optim.Optimizer, max_grad_norm: float | None
    ) -> tuple[torch.optim.Optimizer, list[list[nn.Parameter]]]:
        """The optimizer itself and its parameters that are not frozen."""
        return optimizer, [[p for p in group["params"] if p.requires_grad] for group in optimizer.param_groups]

    def backward(self, loss: Tensor) -> None:
        """Autograd's."""
        loss.backward()

    def loss_scale(self) -> float:
        """1: a GradScaler is not the backend's."""
        return 1.0

    def clear_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Drop `.grad`."""
        optimizer.zero_grad(set_to_none=True)

    def step(
        self, optimizer: torch.optim.Optimizer, max_grad_norm: float | None, scaler: torch.amp.GradScaler | None
    ) -> None:
        """Clip the norm of all gradients together, then step."""
        if scaler is not None:
            scaler.unscale_(optimizer)
        if max_grad_norm is not None:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(parameters, max_grad_norm)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()

    def state_dict(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The optimizer's own."""
        return optimizer.state_dict()

    def load_state_dict(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """The optimizer's own."""
        optimizer.load_state_dict(state)

    def whole_shape(self, parameter: nn.Parameter) -> torch.Size:
        """Its shape."""
        return parameter.shape

    def whole_state(
        self, network: nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """By torch.distributed.checkpoint, which gives the first process alone the tensors of sharded weights."""
        weights, state = get_state_dict(network, optimizer, options=_WHOLE)
        return dict(weights), dict(state)

    def load_whole_state(
        self, network: nn.Module, optimizer: torch.optim.Optimizer, weights: dict[str, Any], state: dict[str, Any]
    ) -> None:
        """By torch.distributed.checkpoint."""
        set_state_dict(network, optimizer, model_state_dict=weights, optim_state_dict=state, options=_WHOLE)


class Unsharded(Autograd):
    """What backends have in common whose processes each hold all of the weights."""

    shards_each = 1
    shard_index = 0

    def shards(self, parameters: Sequence[nn.Parameter]) -> list[Shard]:
        """The parameters themselves."""
        return [Shard(p.detach(), 0, p.numel()) for p in parameters]

    def gradients(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """Each parameter's `.grad`."""
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]

    def watched(self, parameters: Sequence[nn.Parameter], take: Take) -> AbstractContextManager[None]:
        """Takes them away from `.grad`."""
        return taken(parameters, take)

    def sum_over_shards(self, value: Tensor) -> Tensor:
        """`value`: nothing is spread."""
        return value

    def gather(self, parameter: nn.Parameter, local: Tensor) -> Tensor:
        """`local`: it is the whole."""
        return local

    def scatter(self, parameter: nn.Parameter, whole: Tensor) -> Tensor:
        """`whole`: all of it is local."""
        return whole

    def exposed(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """The parameters themselves."""
        return [p.detach() for p in parameters]

    def publish(self, written: Written | None = None) -> None:
        """Nothing to do: the forward reads the very tensors that were written."""

    def forget_copies(self) -> None:
        """There are none."""


class Single(Unsharded):
    """A plain module."""

    def __init__(self, module: nn.Module) -> None:
        self.network = self.ascent_module = self.descent_module = module
        self.peers = Peers()

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        """Gradients accumulate in `.grad` by themselves."""
        return nullcontext()

    def ascent(self, needed: Needed) -> AbstractContextManager[None]:
        """There is no other process."""
        return nullcontext()


def _place(
    module: nn.Module, make_optimizer: MakeOptimizer, world: World, options: Options
) -> tuple[nn.Module, torch.optim.Optimizer]:
    return module, make_optimizer()


register(
    Backend(
        "single",
        "one process that holds everything",
        "PyTorch",
        owns=lambda module: False,  # it is what a module is on that no other backend owns
        sharding=Single,
        place=_place,
        launchers=None,
    )
)

"""One process that holds everything, and what other backends share with it.

`TorchTraining` (one process, DDP, FSDP2) runs passes and steps as torch alone does, `TorchState` (these and ZeRO
stage 0 in fp32) saves and loads them, and `ReplicatedWeights` (one process, DDP, ZeRO stage 0) is for ranks that each
hold and perturb all weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._composable.contract import _get_registry
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from .chunks import Chunk, SavedTensor, whole
from .gradient_hooks import OnGradient, dense, divert_gradients
from .interface import AscentReduction, Shard, WrittenWeights
from .optimizer_trial import Handed
from .process_group import ProcessGroup
from .registry import BACKENDS, Backend, MakeOptimizer, Options
from .world import World


class TorchState:
    """Checkpoints of backends whose optimizer was given the model's own parameters."""

    def optimizer_state_dict(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The optimizer's own."""
        return optimizer.state_dict()

    def load_optimizer_state_dict(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """The optimizer's own."""
        optimizer.load_state_dict(state)

    def optimizer_entries(
        self, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], entry: str
    ) -> list[Tensor | None]:
        """By parameter, of this rank's rows where it is a DTensor."""
        found = [optimizer.state.get(p, {}).get(entry) for p in parameters]
        return [value.to_local() if isinstance(value, DTensor) else value for value in found]

    def named_model_state(self, network: nn.Module) -> dict[str, Tensor | Chunk]:
        """By torch.distributed.checkpoint."""
        return {name: self._named(value) for name, value in get_model_state_dict(network).items()}

    def load_named_model_state(self, network: nn.Module, state: Mapping[str, Tensor | SavedTensor]) -> None:
        """By torch.distributed.checkpoint."""
        mine = get_model_state_dict(network)
        set_model_state_dict(network, {name: self._like(mine.get(name), value) for name, value in state.items()})

    def named_optimizer_state(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """By torch.distributed.checkpoint."""
        state = get_optimizer_state_dict(network, optimizer)
        entries = {name: {key: self._named(value) for key, value in of.items()} for name, of in _by_name(state)}
        return {**state, "state": entries}

    def load_named_optimizer_state(
        self, network: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
    ) -> None:
        """By torch.distributed.checkpoint."""
        mine = dict(_by_name(get_optimizer_state_dict(network, optimizer)))
        entries = {
            name: {key: self._like(mine.get(name, {}).get(key), value) for key, value in of.items()}
            for name, of in _by_name(state)
        }
        named: Any = {**state, "state": entries}
        set_optimizer_state_dict(network, optimizer, named)

    def _named(self, value: Any) -> Any:
        """What a checkpoint keeps of what torch.distributed.checkpoint returns."""
        return value

    def _like(self, mine: Any, saved: Any) -> Any:
        """What torch.distributed.checkpoint takes of what was saved, in the place of `mine`."""
        return whole(saved)


def _by_name(state: Mapping[str, Any]) -> Iterable[tuple[str, Mapping[str, Any]]]:
    """The entries of an optimizer's state, by parameter."""
    return dict(state["state"]).items()


class TorchTraining(TorchState):
    """Backward, clipping and step of backends that leave gradients to autograd and clipping to torch."""

    supports_grad_scaler = leaves_grad = accumulates_in_grad = True
    packs_gradients = False
    reduces_whole = False  # or the shard is the whole
    hands: Handed = "tensors"

    def unwrap_optimizer(
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

    def capture_gradients(
        self, parameters: Sequence[nn.Parameter], on_gradient: OnGradient
    ) -> AbstractContextManager[None]:
        """Takes them away from `.grad`."""
        return divert_gradients(parameters, on_gradient)


class ReplicatedWeights:
    """Weights that every rank holds and perturbs in full, with gradients in `.grad`."""

    shard_group = ProcessGroup()
    weights_replicated = True

    def shards(self, parameters: Sequence[nn.Parameter]) -> list[Shard]:
        """The parameters themselves."""
        return [Shard(p.detach(), 0, p.numel()) for p in parameters]

    def masters(self, parameters: Sequence[nn.Parameter]) -> list[Tensor] | None:
        """There are none."""
        return None

    def gradients(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """Each parameter's `.grad`."""
        return [torch.zeros_like(p) if p.grad is None else dense(p.grad) for p in parameters]

    def resident_gradients(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """The same."""
        return self.gradients(parameters)

    def full_shape(self, parameter: nn.Parameter) -> torch.Size:
        """Its shape."""
        return parameter.shape

    def gather(self, parameter: nn.Parameter, local: Tensor) -> Tensor:
        """`local`: the shard is everything."""
        return local

    def scatter(self, parameter: nn.Parameter, full: Tensor) -> Tensor:
        """`full`: the shard is everything."""
        return full

    def chunk(self, parameter: nn.Parameter, local: Tensor) -> Tensor | Chunk:
        """`local`: the shard is everything."""
        return local

    def resident(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """The parameters themselves."""
        return [p.detach() for p in parameters]

    def publish(self, written: WrittenWeights | None = None) -> None:
        """Nothing to do: every rank has written the same, and the forward reads the very tensors."""

    def reshard(self) -> None:
        """There are no gathered copies."""


class Single(ReplicatedWeights, TorchTraining):
    """A plain module on one process."""

    def __init__(self, module: nn.Module) -> None:
        self.network = self.ascent_module = self.descent_module = module
        self.data_parallel_group = ProcessGroup()
        replicated = "replicate" in (_get_registry(module) or {})
        self._replicated = [p for p in module.parameters() if p.requires_grad] if replicated else []

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        """Gradients accumulate in `.grad` by themselves."""
        return nullcontext()

    def ascent(self, reduction: AscentReduction) -> AbstractContextManager[None]:
        """There is no other process to reduce over, or `replicate` reduces in every backward, as DDP does.

        Raises:
            ValueError: it waits for gradients that this ascent does not compute, and would average none.
        """
        computed = set(map(id, reduction.parameters)) if self._replicated else set()
        if any(id(p) not in computed for p in self._replicated) and dist.get_world_size() > 1:
            raise ValueError(
                "the model is shared by torch's composable replicate, which waits for the gradients of all weights, "
                "and this ascent computes some: wrap it in DistributedDataParallel instead"
            )
        return nullcontext()


def _place(
    module: nn.Module, make_optimizer: MakeOptimizer, world: World, options: Options
) -> tuple[nn.Module, torch.optim.Optimizer]:
    return module, make_optimizer()


BACKENDS.register("single", "one process that holds everything", "PyTorch")(
    Backend(
        title="single",
        owns=lambda module: False,  # it is what a module is on that no other backend owns
        sharding=Single,
        place=_place,
        launchers=None,
        any_memory_format=True,
    )
)

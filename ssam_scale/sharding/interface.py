"""Where the weights live: the one interface between the step and the ways of distributing a model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .gradient_hooks import Take
from .world import Peers


class Elements(Protocol):
    """Some elements of a tensor, in row-major order.

    Attributes:
        count: how many.
        numel: elements of the tensor.
    """

    count: int
    numel: int

    def take(self, source: Tensor) -> Tensor:
        """The elements of `source`, of shape (count,)."""

    def put(self, target: Tensor, values: Tensor) -> None:
        """Write `values`, of shape (count,), to the elements of `target`."""

    def booleans(self) -> Tensor:
        """True for the elements: shape (numel,)."""


@dataclass(frozen=True)
class Needed:
    """What is needed of an ascent pass. Lists are the same on every process.

    Attributes:
        parameters: whose gradients.
        parts: which elements of each one's local gradient; None: all of them.
        whole: which elements of each one's whole gradient those of all processes are.
        kept: parameters that are not perturbed: sharded units of none but these (and frozen ones) stay gathered from
            the ascent until `Sharding.forget_copies` is called. Empty: nothing stays.
        within_shard_group: where there are several copies of sharded weights, whether gradients are averaged over the
            processes of each copy by itself.
    """

    parameters: Sequence[nn.Parameter]
    parts: Sequence[Elements | None]
    whole: Sequence[Elements | None]
    kept: Sequence[nn.Parameter] = ()
    within_shard_group: bool = False


@dataclass(frozen=True)
class Written:
    """What was written to. Lists are the same on every process.

    Attributes:
        parameters: those that were written to on any process.
        local: which elements of each one's shard; None: all of them.
        whole: which elements of what is `Sharding.exposed` of each.
    """

    parameters: Sequence[nn.Parameter]
    local: Sequence[Elements | None]
    whole: Sequence[Elements | None]


@dataclass(frozen=True)
class Shard:
    """The part of one parameter that this process perturbs.

    Attributes:
        weight: the local elements; writing to them writes to the parameter. Empty where this process has none.
        start: row-major position of the first local element in the whole parameter.
        numel: elements of the whole parameter.
    """

    weight: Tensor
    start: int
    numel: int


class Sharding(Protocol):
    """What the step needs to know about a backend. Lists are parallel to the parameters that they are asked for.

    Attributes:
        network: the module inside, which names the parameters.
        ascent_module: what the ascent pass, and the shared prefix, is run on.
        descent_module: what the descent pass is run on.
        shards_each: number of processes that one copy of the weights is spread over.
        shard_index: which of them this process is.
        takes_scaler: whether `step` takes a GradScaler.
        peers: the processes that a batch is spread over.
        exposes_whole: whether `exposed` are whole parameters where `shards` are parts of them.
        packs: whether `ascent` averages nothing but the elements that it is asked for.
    """

    network: nn.Module
    ascent_module: nn.Module
    descent_module: nn.Module
    shards_each: int
    shard_index: int
    takes_scaler: bool
    peers: Peers
    exposes_whole: bool
    packs: bool

    def trained(
        self, optimizer: torch.optim.Optimizer, max_grad_norm: float | None
    ) -> tuple[torch.optim.Optimizer, list[list[nn.Parameter]]]:
        """The torch optimizer that `optimizer` is or wraps, and the model's parameters that it steps, by group.

        Raises:
            ValueError: `optimizer` is not this model's, or the backend does not clip gradients to `max_grad_norm`.
        """

    def shards(self, parameters: Sequence[nn.Parameter]) -> list[Shard]:
        """The local shards of `parameters`."""

    def gradients(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """The local gradients of `parameters`, shaped like their shards; zeros where a pass left none."""

    def ascent(self, needed: Needed) -> AbstractContextManager[None]:
        """Surrounds the micro-batches of an ascent pass, which go through `ascent_module`. Collective.

        After it `gradients` are averages over the data-parallel processes: those that are needed, and the others are
        not defined. Nor are, where `packs`, the elements that are not needed.
        """

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        """Surrounds forward and backward of one micro-batch; gradients are reduced in the last one."""

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of a scalar `loss` that was computed by one of the modules."""

    def loss_scale(self) -> float:
        """What `backward` multiplies a loss by."""

    def watched(self, parameters: Sequence[nn.Parameter], take: Take) -> AbstractContextManager[None]:
        """Backwards inside, through `ascent_module`, show this process's gradients before any reduction. Collective.

        Whether they are also reduced and kept is up to the backend: clear them before and after, and ask for neither
        gradients nor shards inside.

        Args:
            parameters: that require a gradient.
            take: called as `take(index, gradient)`, in the order of the backward, with the gradient of all of
                `parameters[index]`; not called for a parameter that the loss does not depend on, and several times for
                one that reentrant checkpointing uses several times, whose gradient is the sum. May keep the gradient
                but not write to it.
        """

    def clear_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Forget every gradient, wherever the backend keeps it."""

    def step(
        self, optimizer: torch.optim.Optimizer, max_grad_norm: float | None, scaler: torch.amp.GradScaler | None
    ) -> None:
        """Clip the gradients and step, both as `trained` agreed to.

        Args:
            optimizer: as `trained` returned it.
            max_grad_norm: as `trained` was given it.
            scaler: what the losses were scaled by; it may skip the step.
        """

    def sum_over_shards(self, value: Tensor) -> Tensor:
        """`value` summed, in place, over the processes that share one copy of the weights."""

    def gather(self, parameter: nn.Parameter, local: Tensor) -> Tensor:
        """The whole tensor, shaped like `parameter`, of which every process holds `local` in the place of its shard."""

    def scatter(self, parameter: nn.Parameter, whole: Tensor) -> Tensor:
        """The part of `whole` that lies in the place of this process's shard of `parameter`."""

    def exposed(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """What changes on this process when the shards of `parameters` are written to and published.

        Who puts all of it back, and forgets copies, has undone both without a word to the other processes.
        """

    def publish(self, written: Written | None = None) -> None:
        """Make the next forward on every process use the shards as they are now. Collective.

        Args:
            written: what has changed since all processes agreed; None: perhaps everything.
        """

    def forget_copies(self) -> None:
        """Drop copies of weights, such as gathered ones, that were made before the weights changed. Not collective."""

    def state_dict(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """`optimizer`'s state in torch's form.

        Raises:
            RuntimeError: it has none that means the model's parameters.
        """

    def load_state_dict(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""

    def whole_shape(self, parameter: nn.Parameter) -> torch.Size:
        """The shape of `parameter` over all processes."""

    def whole_state(
        self, network: nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """What a checkpoint holds, the same under every backend: whole tensors in CPU memory. Collective.

        Only the first process is sure to get them, and they may be the live weights: write or copy them before a step.

        Args:
            network: the part of the model that names the parameters.
            optimizer: as `trained` returned it.

        Returns:
            Weights and buffers by name; and of the optimizer `state` (by parameter, then by entry) and `param_groups`
            (with names in the place of parameters).
        """

    def load_whole_state(
        self, network: nn.Module, optimizer: torch.optim.Optimizer, weights: dict[str, Any], state: dict[str, Any]
    ) -> None:
        """Take back what `whole_state` returned, under any backend and number of processes."""

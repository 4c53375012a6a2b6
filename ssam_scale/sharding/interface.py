"""What the step needs of a way of distributing a model: to read and write weights, to run passes, to save state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from .chunks import Chunk, SavedTensor
from .gradient_hooks import OnGradient
from .optimizer_trial import Handed
from .process_group import ProcessGroup


class Elements(Protocol):
    """A subset of a tensor's elements, in row-major order.

    Attributes:
        count: how many.
        numel: elements of the tensor.
        device: where the tensor is.
    """

    count: int
    numel: int
    device: torch.device

    def take(self, source: Tensor) -> Tensor:
        """The elements of `source`, of shape (count,)."""

    def put(self, target: Tensor, values: Tensor) -> None:
        """Write `values`, of shape (count,), to the elements of `target`."""

    def booleans(self) -> Tensor:
        """True for the elements: bool of shape (numel,)."""

    @staticmethod
    def masked_select(tensors: Sequence[Tensor], elements: Sequence[Any]) -> list[Tensor]:
        """What `take` returns of each tensor, at once; None: a copy of all of it."""

    @staticmethod
    def masked_scatter_(tensors: Sequence[Tensor], elements: Sequence[Any], values: Sequence[Tensor]) -> None:
        """What `put` does to each tensor, at once; None: all of it is written to."""

    def of_booleans(self, booleans: Tensor) -> Elements:
        """Of another tensor, the elements for which `booleans`, of shape (its elements,), are True."""


class Shard(NamedTuple):
    """The part of one parameter that this rank perturbs.

    Attributes:
        weight: the local elements; writing to them writes to the parameter. Empty where this rank has none.
        start: row-major position of the first local element in the full parameter.
        numel: elements of the full parameter.
    """

    weight: Tensor
    start: int
    numel: int


@dataclass(frozen=True)
class AscentReduction:
    """Which gradients an ascent pass has to reduce, and which weights it may leave gathered. The same on every rank.

    Attributes:
        parameters: whose gradients.
        local: which elements of each one's shard; None: all of them.
        full: which elements of each one's full gradient: those of all shards together.
        keep_gathered: parameters that are not perturbed. Units of FSDP2, or parameters of ZeRO-3, that are none but
            these (and frozen ones) stay gathered until `reshard` is called. Empty: nothing stays.
        within_shard_group: with several replicas of sharded weights (HSDP), whether each replica averages by itself.
    """

    parameters: Sequence[nn.Parameter]
    local: Sequence[Elements | None]
    full: Sequence[Elements | None]
    keep_gathered: Sequence[nn.Parameter] = ()
    within_shard_group: bool = False


@dataclass(frozen=True)
class WrittenWeights:
    """Which weights have been written to since the ranks last agreed. The same parameters on every rank.

    Attributes:
        parameters: those that were written to on any rank.
        local: which elements of each one's shard; None: all of them.
        resident: which elements of what is `ShardedWeights.resident` of each.
    """

    parameters: Sequence[nn.Parameter]
    local: Sequence[Elements | None]
    resident: Sequence[Elements | None]


class ShardedWeights(Protocol):
    """Reads and writes weights and gradients where they are sharded. Lists are parallel to the parameters asked for.

    Attributes:
        network: the module inside of wrappers, which names the parameters.
        shard_group: the ranks that one copy of the weights is sharded over.
        weights_replicated: whether every rank holds full weights, also where it perturbs only a shard of them (ZeRO 1
            and 2).
    """

    network: nn.Module
    shard_group: ProcessGroup
    weights_replicated: bool

    def shards(self, parameters: Sequence[nn.Parameter]) -> list[Shard]:
        """The local shards of `parameters`."""

    def masters(self, parameters: Sequence[nn.Parameter]) -> list[Tensor] | None:
        """Of shards in bf16 or fp16, the float32 numbers that they are rounded from; None: the shards are all there is.

        The optimizer steps these and ε is added to them, of which a shard of few bits would lose most. Of the shards'
        shapes, and not to be written to.
        """

    def gradients(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """The local gradients of `parameters`, shaped like their shards; zeros where a pass left none."""

    def resident_gradients(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """The gradients of what is `resident`, after an `ascent` of a backend with `reduces_whole`."""

    def full_shape(self, parameter: nn.Parameter) -> torch.Size:
        """The shape of the full parameter, on a rank that may hold only a shard of it."""

    def gather(self, parameter: nn.Parameter, local: Tensor) -> Tensor:
        """The full tensor, shaped like `parameter`, of which every rank holds the shard `local`. Collective."""

    def scatter(self, parameter: nn.Parameter, full: Tensor) -> Tensor:
        """This rank's shard of `full`, which every rank holds. Not collective."""

    def chunk(self, parameter: nn.Parameter, local: Tensor) -> Tensor | Chunk:
        """What `gather` would gather, before it is; `local` itself where every rank holds everything."""

    def resident(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """What changes on this rank when the shards of `parameters` are written to and published.

        The full parameters under DDP and ZeRO 0 to 2, the shards under FSDP2 and ZeRO-3. Copying these back, and
        `reshard`, undoes both without any communication.
        """

    def publish(self, written: WrittenWeights | None = None) -> None:
        """Make the next forward on every rank use the shards as they are now. Collective.

        Args:
            written: what has changed since all ranks agreed; None: perhaps everything.
        """

    def reshard(self) -> None:
        """Free gathered copies of weights, which may be older than the shards. Not collective."""


class ShardedPasses(Protocol):
    """Runs forwards, backwards and the optimizer's step through the wrapper that distributes the model.

    Attributes:
        network: the module inside of wrappers.
        ascent_module: what the ascent pass, and the shared prefix, is run on.
        descent_module: what the descent pass is run on.
        data_parallel_group: the ranks that a batch is split over, in the order of their parts.
        supports_grad_scaler: whether `step` takes a GradScaler.
        leaves_grad: whether gradients are in `.grad`, as autograd leaves them.
        accumulates_in_grad: whether the gradients of micro-batches wait in `.grad`, unreduced, for the last one.
        packs_gradients: whether `ascent` reduces nothing but the elements that it is asked for.
        reduces_whole: whether `ascent` leaves whole gradients on every rank though the optimizer steps shards (ZeRO 1
            and 2 in float32): each rank can perturb all weights by itself, and has nothing to publish.
        hands: what the optimizer is given to step.
    """

    network: nn.Module
    ascent_module: nn.Module
    descent_module: nn.Module
    data_parallel_group: ProcessGroup
    supports_grad_scaler: bool
    leaves_grad: bool
    accumulates_in_grad: bool
    packs_gradients: bool
    reduces_whole: bool
    hands: Handed

    def unwrap_optimizer(
        self, optimizer: torch.optim.Optimizer, max_grad_norm: float | None
    ) -> tuple[torch.optim.Optimizer, list[list[nn.Parameter]]]:
        """The torch optimizer that `optimizer` is or wraps, and the model's parameters that it steps, by group.

        Raises:
            ValueError: `optimizer` is not this model's, or the backend does not clip gradients to `max_grad_norm`.
        """

    def ascent(self, reduction: AscentReduction) -> AbstractContextManager[None]:
        """Surrounds the micro-batches of an ascent pass, which go through `ascent_module`. Collective.

        After it `gradients` of what was asked for are averages over the data-parallel ranks. Others are not defined;
        nor, where `packs_gradients`, are elements that were not asked for.
        """

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        """Surrounds forward and backward of one micro-batch; gradients are reduced in the last one."""

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of a scalar `loss` that was computed by one of the modules."""

    def loss_scale(self) -> float:
        """What `backward` multiplies a loss by."""

    def capture_gradients(
        self, parameters: Sequence[nn.Parameter], on_gradient: OnGradient
    ) -> AbstractContextManager[None]:
        """Backwards inside, through `ascent_module`, hand over this rank's gradients before any reduction. Collective.

        Whether they are also reduced and kept is up to the backend: clear them before and after, and ask for neither
        gradients nor shards inside.

        Args:
            parameters: that require a gradient.
            on_gradient: called as `on_gradient(index, gradient)`, in the order of the backward, with the full gradient
                of `parameters[index]`; not called for a parameter that the loss does not depend on, and several times
                for one that reentrant checkpointing uses several times, whose gradient is the sum. May keep the
                gradient but not write to it.
        """

    def clear_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Drop every gradient, wherever the backend keeps it."""

    def step(
        self, optimizer: torch.optim.Optimizer, max_grad_norm: float | None, scaler: torch.amp.GradScaler | None
    ) -> None:
        """Clip the gradients and step the optimizer.

        Args:
            optimizer: as `unwrap_optimizer` returned it.
            max_grad_norm: as `unwrap_optimizer` was given it.
            scaler: what the losses were scaled by; it may skip the step.
        """


class ShardedState(Protocol):
    """Saves and loads weights and optimizer state."""

    def optimizer_state_dict(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """`optimizer`'s state in torch's form, sharded as the weights are.

        Raises:
            RuntimeError: it has none that is about the model's parameters.
        """

    def load_optimizer_state_dict(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Take back what `optimizer_state_dict` returned."""

    def optimizer_entries(
        self, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], entry: str
    ) -> list[Tensor | None]:
        """What the optimizer keeps under `entry` for the local shards of `parameters`; None where it keeps nothing.

        As it lies there, and not to be written to.
        """

    def named_model_state(self, network: nn.Module) -> dict[str, Tensor | Chunk]:
        """Weights and buffers by name: the same names and full shapes under every backend. Collective.

        They may be the live weights: write or copy them before a step. `chunks.gathered` makes full tensors of them.

        Args:
            network: the part of the model that names the parameters.
        """

    def load_named_model_state(self, network: nn.Module, state: Mapping[str, Tensor | SavedTensor]) -> None:
        """Take back what `named_model_state` returned, in full, under any backend and number of ranks. Collective."""

    def named_optimizer_state(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The optimizer's state, in the way of `named_model_state`. Collective.

        Args:
            network: the part of the model that names the parameters.
            optimizer: as `unwrap_optimizer` returned it.

        Returns:
            `state` (by parameter, then by entry) and `param_groups` (with names in the place of parameters).
        """

    def load_named_optimizer_state(
        self, network: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
    ) -> None:
        """Take back what `named_optimizer_state` returned, in full, as `load_named_model_state` does. Collective."""


class Sharding(ShardedWeights, ShardedPasses, ShardedState, Protocol):
    """A backend: all that `SparseSAM` needs to know about how a model is distributed."""

"""Per-sample gradients of several samples at once, where a process has whole weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.func import functional_call, grad, vmap
from torch.utils._pytree import tree_flatten, tree_unflatten

from ssam_scale.sharding import Sharding

from .passes import LossFn


def check_chunk(sharding: Sharding, parameters: Sequence[nn.Parameter], chunk: int) -> None:
    """Refuse a chunk that cannot work.

    Raises:
        ValueError: `chunk` is below 1, or above 1 where a process has only parts of the weights.
    """
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; at least 1 is needed")
    if chunk > 1 and any(isinstance(p, DTensor) or p.shape != sharding.whole_shape(p) for p in parameters):
        raise ValueError(
            f"chunk is {chunk} but a process has only parts of the weights (FSDP2, ZeRO stage 3), and gathers them for "
            "one sample at a time; use 1"
        )


def gradients_of(
    network: nn.Module, parameters: Sequence[nn.Parameter], loss_fn: LossFn, samples: Sequence[Any], scale: float
) -> list[dict[int, Tensor]]:
    """The gradients of every sample, by `torch.func.vmap`; the sums in them are made in another order than alone.

    Args:
        network: with whole weights.
        parameters: of it.
        loss_fn: of a batch of one sample, given the forward to use; must not draw random numbers.
        samples: batches of one sample, of the same structure and shapes.
        scale: factor on the loss.

    Returns:
        Of every sample: whole float32 gradients by index of the parameter, views of one tensor for all samples.

    Raises:
        RuntimeError: `loss_fn` draws random numbers or branches on values, or `vmap` does not know an operation in it.
    """
    names = {id(p): name for name, p in network.named_parameters()}
    flat = [tree_flatten(sample) for sample in samples]
    structure = flat[0][1]
    is_tensor = [isinstance(leaf, Tensor) for leaf in flat[0][0]]
    places = [0 if tensor else None for tensor in is_tensor]
    stacked = [torch.stack([leaves[i] for leaves, _ in flat]) if t else flat[0][0][i] for i, t in enumerate(is_tensor)]

    def loss(weights: dict[str, Tensor], leaves: list[Any]) -> Tensor:
        def forward(*args: Any, **kwargs: Any) -> Any:
            return functional_call(network, weights, args, kwargs)

        return loss_fn(forward, tree_unflatten(leaves, structure)) * scale

    weights = {names[id(p)]: p.detach() for p in parameters}
    per_sample = vmap(grad(loss), in_dims=(None, places))(weights, stacked)
    whole = [per_sample[names[id(p)]].float() for p in parameters]
    return [{index: g[i] for index, g in enumerate(whole)} for i in range(len(samples))]

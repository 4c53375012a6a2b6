"""The empirical Fisher score of every weight (arXiv 2210.05177, equation 9)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ssam_scale.masks import add_squares
from ssam_scale.sharding import Sharding

from .batchnorm import evaluation_mode
from .passes import LossFn


def fisher_scores(
    sharding: Sharding,
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[nn.Parameter],
    loss_fn: LossFn,
    batches: Sequence[Any],
    *,
    scale: float = 1.0,
) -> list[Tensor]:
    """Σ over samples of the squared per-sample gradient, times `scale`²: float32, shaped like the local shards.

    Runs in evaluation mode and leaves no trace in the model. Every process scores the samples of all processes, one at
    a time, which makes the result the same under any sharding at the price of small passes only. Collective.

    Args:
        sharding: where the weights live.
        optimizer: whose gradients are cleared.
        parameters: what to score.
        loss_fn: mean loss of a batch, given the forward to use; called with batches of one sample.
        batches: this process's samples: tensors, or nested containers of tensors, whose first dimension counts samples;
            the same number of them on every process.
        scale: factor on the loss, which keeps gradients of float16 passes from becoming zero.
    """
    scores = [torch.zeros_like(s.weight, dtype=torch.float32) for s in sharding.shards(parameters)]
    sharding.clear_gradients(optimizer)
    try:
        with evaluation_mode(sharding.network):
            for batch in batches:
                for sample in _samples(tree_map(sharding.gather_samples, batch)):
                    with torch.enable_grad(), sharding.micro_batch(last=True):
                        sharding.backward(loss_fn(sharding.ascent_module, sample) * scale)
                    add_squares(scores, sharding.gradients(parameters))
                    sharding.clear_gradients(optimizer)
    finally:
        sharding.clear_gradients(optimizer)
        sharding.forget_copies()
    return scores


def _samples(batch: Any) -> Iterator[Any]:
    """The samples of a batch, each as a batch of one."""
    leaves: list[Tensor] = []
    tree_map(lambda leaf: leaves.append(leaf), batch)
    for index in range(len(leaves[0])):
        yield tree_map(lambda leaf, i=index: leaf[i : i + 1], batch)

"""Which samples of a micro-batch a pass sees: the first, random ones, or those of the highest loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from .arguments import check_loss
from .loss import LossFn
from .reference import first_samples
from .rng import hashed, uniform_


class SampleRows:
    """Some samples of a micro-batch.

    Args:
        chosen: their indices, or the range of them.

    Attributes:
        full_of: the tensor of all samples, by identity of one of the chosen.
    """

    def __init__(self, chosen: slice | Tensor) -> None:
        self.chosen = chosen
        self.full_of: dict[int, Tensor] = {}

    def of(self, batch: Any) -> Any:
        """What of a micro-batch is theirs: its leaves without a dimension are everybody's."""
        return tree_map_only(Tensor, self._of_leaf, batch)

    def _of_leaf(self, leaf: Tensor) -> Tensor:
        if not leaf.ndim:
            return leaf
        rows = leaf[self.chosen if isinstance(self.chosen, slice) else self.chosen.to(leaf.device)]
        self.full_of[id(rows)] = leaf
        return rows


def number_of(batch: Any) -> int:
    """How many samples a micro-batch has; 0 where it has no tensor that says so."""
    return next((len(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim), 0)


def first(samples: int, fraction: float) -> SampleRows:
    """The first ones."""
    return SampleRows(slice(first_samples(samples, fraction)))


def random(samples: int, fraction: float, stream: int, rank: int, device: torch.device) -> SampleRows:
    """Others for each micro-batch and process; of two fractions the smaller one's are among the larger one's.

    Args:
        samples: how many there are.
        fraction: of them.
        stream: number of the micro-batch in the run.
        rank: of the process.
        device: of the indices.
    """
    drawn = torch.empty(samples, device=device)
    uniform_(drawn, 0, hashed(stream, rank))
    return highest(drawn, fraction)


def highest(scores: Tensor, fraction: float) -> SampleRows:
    """Those of the highest score, of shape (samples,)."""
    return SampleRows(scores.topk(first_samples(len(scores), fraction)).indices)


@torch.no_grad()
def losses_of_each(loss_fn: LossFn, batch: Any, outputs: Sequence[Any], asked_by: str) -> Tensor:
    """The loss of every sample of a micro-batch, of shape (samples,).

    Args:
        loss_fn: the mean loss of a micro-batch.
        batch: the micro-batch.
        outputs: what `forward` has returned for it, in the order of its calls.
        asked_by: the option that asks for them, for the message.

    Raises:
        ValueError: the loss function cannot be mapped over samples.
    """
    leaves, structure = tree_flatten((batch, outputs))
    many = [isinstance(leaf, Tensor) and leaf.ndim > 0 for leaf in leaves]

    def loss(*of_one: Tensor) -> Tensor:
        own = iter(of_one)
        single = [next(own)[None] if has_samples else leaf for leaf, has_samples in zip(leaves, many, strict=True)]
        sample, seen = tree_unflatten(single, structure)
        ran = iter(seen)
        return _scalar(loss_fn(lambda *args, **kwargs: next(ran), sample))

    try:
        each: Tensor = torch.vmap(loss)(*(leaf for leaf, has_samples in zip(leaves, many, strict=True) if has_samples))
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"{asked_by} asks for the loss of each sample, by torch.vmap of the loss function over what the model put "
            f"out, which fails: {str(error).splitlines()[0]}"
        ) from error
    return each


def _scalar(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        check_loss(loss)
    return loss.reshape(())

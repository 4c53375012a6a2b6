"""The loss along random directions in the space of weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .loss import MeanLoss


def filter_normalized(weights: Mapping[str, Tensor], seed: int) -> Tensor:
    """A random direction in which every filter is as long as that of the weights: of shape (weights,), on their device.

    Li et al., "Visualizing the Loss Landscape of Neural Nets" (arXiv 1712.09913), section 4: d_ij ← d_ij / ‖d_ij‖ ·
    ‖w_ij‖ of a normal d. So networks whose weights differ in scale, which layers before a normalization take back, can
    be compared. A filter is what belongs to one output: of a convolution, and a row of a linear layer. Biases, weights
    of normalizations and all else of one dimension stay as they are, as in the code of the paper.

    Args:
        weights: by name.
        seed: of d: the same for the same shapes, whatever the weights are, and on any device.
    """
    generator = torch.Generator().manual_seed(seed)
    pieces = []
    for weight in weights.values():
        drawn = torch.randn(weight.shape, generator=generator, dtype=weight.dtype).to(weight.device)
        if weight.ndim < 2:
            pieces.append(torch.zeros_like(drawn).flatten())
            continue
        filters, own = drawn.flatten(1), weight.detach().flatten(1)
        pieces.append((filters / filters.norm(dim=1, keepdim=True) * own.norm(dim=1, keepdim=True)).flatten())
    return torch.cat(pieces)


def curve(loss: MeanLoss, direction: Tensor, places: Sequence[float]) -> list[float]:
    """The loss at w + a·d for each place a. Collective.

    Args:
        loss: L.
        direction: d, of shape (weights,).
        places: the numbers a.
    """
    return loss.values(a * direction for a in places)


def plane(loss: MeanLoss, directions: tuple[Tensor, Tensor], places: Sequence[float]) -> list[list[float]]:
    """The loss at w + a·d + b·e: a row for each b, in which a is each of the places. Collective.

    Args:
        loss: L.
        directions: d and e, of shape (weights,).
        places: the numbers a, and the numbers b.
    """
    across, up = directions
    found = loss.values(a * across + b * up for b in places for a in places)
    return [found[row * len(places) : (row + 1) * len(places)] for row in range(len(places))]

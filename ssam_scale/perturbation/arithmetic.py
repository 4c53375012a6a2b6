"""The arithmetic of the ascent on lists of local shards: no collective and no host synchronisation in here."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_TINY = 1e-7  # of the papers' code: keeps a vanishing gradient from dividing by zero


def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """Σ x² over all elements of `tensors`: float32 of shape (), zero for none."""
    if not tensors:
        return torch.zeros(())
    norms = torch._foreach_norm(list(tensors), 2, dtype=torch.float32)
    return torch.stack(norms).square_().sum()


def mask_(gradients: Sequence[Tensor], masks: Sequence[Tensor | None]) -> None:
    """Gradients become m ⊙ g in place; a mask of None stands for ones."""
    masked = [(g, m) for g, m in zip(gradients, masks, strict=True) if m is not None]
    if masked:
        torch._foreach_mul_([g for g, _ in masked], [m for _, m in masked])


def scale_to_radius_(gradients: Sequence[Tensor], rho: float, norm: Tensor) -> None:
    """Gradients become ε = ρ · g / (‖·‖ + 1e-7) in place (arXiv 2210.05177, equation 5, with m in g).

    Args:
        gradients: m ⊙ g.
        rho: the radius ρ.
        norm: the norm divided by, of shape ().
    """
    torch._foreach_mul_(list(gradients), rho / (norm + _TINY))

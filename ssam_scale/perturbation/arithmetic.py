"""The arithmetic of the ascent on lists of local shards: no collective and no host synchronisation in here."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_TINY = 1e-7  # of the papers' code: keeps a vanishing gradient from dividing by zero
_ETA = 0.01  # of the ASAM paper: lets weights at zero be perturbed, too


def at_least_fp32(tensors: Sequence[Tensor]) -> list[Tensor]:
    """`tensors`, those of less than 32 bits as float32 copies."""
    return [t.float() if t.element_size() < 4 else t for t in tensors]


def squares(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Σ x² of each tensor: float32 of shape (number of tensors,)."""
    if not tensors:
        return torch.zeros(0, device=device)
    return torch.stack(torch._foreach_norm(list(tensors), 2, dtype=torch.float32)).square_()


def adaptive_scales(weights: Sequence[Tensor]) -> list[Tensor]:
    """T = |w| + η, the scale that makes sharpness independent of rescaling weights (ASAM, arXiv 2102.11600, eq. 3)."""
    if not weights:
        return []
    scales = at_least_fp32(torch._foreach_abs(list(weights)))
    torch._foreach_add_(scales, _ETA)
    return scales


def scale_to_radius_(gradients: Sequence[Tensor], radii: Sequence[float], reach: Tensor | float, norm: Tensor) -> None:
    """Gradients become ε = ρ · κ · g / (‖·‖ + 1e-7) in place (arXiv 2210.05177, equation 5, with m in g).

    Where the norm is not finite they become zeros: there is no direction to go.

    Args:
        gradients: m ⊙ g.
        radii: ρ of each gradient.
        reach: κ, the share of the radius to go, of shape ().
        norm: the norm divided by, of shape ().
    """
    if not gradients:
        return
    scale = reach / (norm + _TINY)
    for radius in set(radii):
        torch._foreach_mul_([g for g, r in zip(gradients, radii, strict=True) if r == radius], radius * scale)
    zero_unless_(gradients, norm.isfinite())


def zero_unless_(tensors: Sequence[Tensor], condition: Tensor) -> None:
    """Zeros in the place of everything in `tensors` (of 4 or 8 bytes an element) unless `condition`, of shape ().

    Decided without making the host wait for the device: zero is what the bit pattern of anything, not-a-number
    included, becomes when multiplied by 0.
    """
    if condition.is_cpu:
        if not condition:
            torch._foreach_zero_(list(tensors))
        return
    for size, integer in {4: torch.int32, 8: torch.int64}.items():
        if same := [t.view(integer) for t in tensors if t.element_size() == size]:
            torch._foreach_mul_(same, condition.to(integer))

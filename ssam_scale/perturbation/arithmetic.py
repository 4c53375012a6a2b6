"""Arithmetic of gradients and perturbations on lists of tensors, in float32 or more, without waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ssam_scale.masks import Subset, masked_select, masked_squares

_ETA = 0.01  # of the ASAM paper: lets weights at zero be perturbed, too


def at_least_fp32(tensors: Sequence[Tensor]) -> list[Tensor]:
    """`tensors`, those of less than 32 bits as float32 copies."""
    return [t.float() if t.element_size() < 4 else t for t in tensors]


def squares(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Σ x² of each tensor, of shape (number of tensors,): float32, or float64 where a tensor is."""
    return masked_squares(tensors, [None] * len(tensors))[0] if tensors else torch.zeros(0, device=device)


def adaptive_scales(weights: Sequence[Tensor]) -> list[Tensor]:
    """T = |w| + η, the scale that makes sharpness independent of rescaling weights (ASAM, arXiv 2102.11600, eq. 3)."""
    if not weights:
        return []
    scales = at_least_fp32(torch._foreach_abs(list(weights)))
    torch._foreach_add_(scales, _ETA)
    return scales


def picked(tensors: Sequence[Tensor], parts: Sequence[Subset | None]) -> list[Tensor]:
    """Copies of the elements that parts have, and the tensors themselves where all take part."""
    some = [(t, part) for t, part in zip(tensors, parts, strict=True) if part is not None]
    copies = iter(masked_select([t for t, _ in some], [part for _, part in some]))
    return [t if part is None else next(copies) for t, part in zip(tensors, parts, strict=True)]


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

"""The step written out slowly, for one process: what every fast path must equal.

No stages, no sharing, no skipping: two full passes over the whole batch and a mask spelled out for every weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .batchnorm import frozen_statistics


def reference_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    batch: Any,
    *,
    rho: float,
    mask: Mapping[str, Tensor],
    norm: Literal["dense", "masked"],
    max_grad_norm: float | None = None,
) -> Tensor:
    """One step of masked SAM: ε = ρ · (m ⊙ g) / ‖·‖, then the base optimizer with the gradient at w + ε.

    Args:
        model: the network; its parameters are stepped in place.
        optimizer: the base optimizer.
        loss_fn: mean loss of the model on a batch.
        batch: the whole global batch.
        rho: radius of the perturbation; with 0 the result is the base optimizer's.
        mask: 1 for perturbed, by parameter name and of its shape; what is missing counts as zeros.
        norm: divide by ‖g‖ (dense) or ‖m ⊙ g‖ (masked).
        max_grad_norm: the descent gradient is clipped to this norm.

    Returns:
        The loss at w.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in named.items()}

    optimizer.zero_grad()
    loss = loss_fn(model, batch)
    loss.backward()
    gradient = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in named.items()}
    masked = {n: g * mask[n].to(g.dtype) if n in mask else torch.zeros_like(g) for n, g in gradient.items()}
    divisor = gradient if norm == "dense" else masked
    length = torch.stack([(g.double() ** 2).sum() for g in divisor.values()]).sum().sqrt()
    with torch.no_grad():
        for name, p in named.items():
            p.copy_(before[name] + (rho / (length + 1e-7)).float() * masked[name])

    optimizer.zero_grad()
    with frozen_statistics(model):
        loss_fn(model, batch).backward()
    with torch.no_grad():
        for name, p in named.items():
            p.copy_(before[name])
    if max_grad_norm is not None:
        torch.nn.utils.clip_grad_norm_(named.values(), max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()

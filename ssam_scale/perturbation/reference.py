"""The step written out slowly, for one process: what every fast path must equal.

No stages, no sharing, no skipping: two full passes over the whole batch and a mask spelled out for every weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .batchnorm import frozen_statistics


def at_least_fp32(t: Tensor) -> Tensor:
    """What the perturbation is computed in."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def reference_gradient(
    model: nn.Module, loss_fn: Callable[[nn.Module, Any], Tensor], batch: Any, *, adaptive: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and, by parameter name, its gradient, zeros where there is none, times |w| + 0.01 if adaptive.

    In float32, or float64 where the weights are.

    Args:
        model: the network.
        loss_fn: mean loss of the model on a batch.
        batch: the whole global batch.
        adaptive: in the coordinates of ASAM (arXiv 2102.11600, equation 3).
    """
    model.zero_grad()
    loss = loss_fn(model, batch)
    loss.backward()
    gradient = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    model.zero_grad()
    gradient = {name: at_least_fp32(g) for name, g in gradient.items()}
    return loss.detach(), in_adaptive_coordinates(gradient, model) if adaptive else gradient


def in_adaptive_coordinates(gradient: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """T g, T = |w| + 0.01."""
    weights = dict(model.named_parameters())
    return {name: g * (at_least_fp32(weights[name].detach()).abs() + 0.01) for name, g in gradient.items()}


def first_samples(samples: int, fraction: float) -> int:
    """How many of a micro-batch's samples the ascent sees: their share, rounded down, and at least one.

    A product that is whole but for the rounding of floats is that: 0.29 of 100 are 29, a third of 99 are 33.
    """
    return max(1, int(samples * fraction + 1e-6))


def masked_by(gradient: Mapping[str, Tensor], mask: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """m ⊙ g; what has no mask is not perturbed."""
    return {n: g * mask[n].to(g.dtype) if n in mask else torch.zeros_like(g) for n, g in gradient.items()}


def length_of(gradient: Mapping[str, Tensor]) -> Tensor:
    """The norm of all tensors together, summed in float64."""
    return torch.stack([(g.double() ** 2).sum() for g in gradient.values()]).sum().sqrt()


def reference_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    batch: Any,
    *,
    rho: float | Mapping[str, float],
    mask: Mapping[str, Tensor],
    norm: Literal["dense", "masked"],
    adaptive: bool = False,
    max_grad_norm: float | None = None,
    ascent_batch: Any | None = None,
    along: Mapping[str, Tensor] | None = None,
    gap: float = 0.0,
    descent_batch: Callable[[], Any] | None = None,
    alone: Sequence[tuple[Any, Any]] = (),
) -> Tensor:
    """One step of masked SAM: ε = ρ · (m ⊙ g) / ‖·‖, then the base optimizer with the gradient at w + ε.

    Both passes draw the same random numbers, from the CPU's generator.

    With `adaptive`, T = |w| + 0.01: ε = ρ · T (m ⊙ T g) / ‖·‖, the norm being that of T g or m ⊙ T g.

    Args:
        model: the network; its parameters are stepped in place.
        optimizer: the base optimizer.
        loss_fn: mean loss of the model on a batch.
        batch: the whole global batch.
        rho: radius of the perturbation, or one for each parameter by name; with 0 the result is the base optimizer's.
        mask: 1 for perturbed, by parameter name and of its shape; what is missing counts as zeros.
        norm: divide by ‖g‖ (dense) or ‖m ⊙ g‖ (masked).
        adaptive: perturb weights in proportion to their magnitude.
        max_grad_norm: the descent gradient is clipped to this norm.
        ascent_batch: the part of the batch that the ascent sees; None: all of it.
        along: in the place of g, by parameter name: there is no ascent.
        gap: α of GSAM: of the masked part of g, what is orthogonal to the descent's gradient is taken off that.
        descent_batch: called at w + ε, says the part of the batch that the descent sees; None: all of it.
        alone: equal parts of the batch, each of which climbs and descends by itself (m-sharpness), as what the ascent
            sees of it and all of it; their mean gradient is stepped by. Empty: the batch is one such part.

    Returns:
        The loss at w, or without an ascent at w + ε.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in named.items()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    losses, gradients, random = [], [], torch.get_rng_state()
    for seen, part in alone or [(batch if ascent_batch is None else ascent_batch, batch)]:
        torch.set_rng_state(random)
        if along is None:
            loss, gradient = reference_gradient(model, loss_fn, seen, adaptive=adaptive)
            losses.append(loss)
            buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        else:
            gradient = in_adaptive_coordinates(along, model) if adaptive else dict(along)
        masked = masked_by(gradient, mask)
        length = length_of(gradient if norm == "dense" else masked)
        with torch.no_grad():
            for name, p in named.items():
                radius = rho[name] if isinstance(rho, Mapping) else rho
                scale = at_least_fp32(before[name]).abs() + 0.01 if adaptive else 1.0
                p.copy_(before[name] + (radius / (length + 1e-7)).to(masked[name].dtype) * scale * masked[name])

        optimizer.zero_grad()
        torch.set_rng_state(random)
        with frozen_statistics(model):
            chosen = part if descent_batch is None else descent_batch()
            torch.set_rng_state(random)
            loss = loss_fn(model, chosen)
            loss.backward()
        losses += [loss.detach()] if along is not None else []
        gradients.append({name: None if p.grad is None else p.grad.clone() for name, p in named.items()})
        if gap and float(length) > 0.0:
            sharp = {n: at_least_fp32(g) for n, g in gradients[-1].items() if g is not None}
            within = masked_by(sharp, mask)
            inner = sum((masked[n].double() * within[n].double()).sum() for n in within)
            share = (inner / length_of(within) ** 2).float()
            gradients[-1] = {n: g - gap * (masked[n] - share * within[n]) for n, g in sharp.items()}
        with torch.no_grad():
            for name, buffer in buffers.items():
                model.get_buffer(name).copy_(buffer)
            for name, p in named.items():
                p.copy_(before[name])
    for name, p in named.items():
        each = [gradient[name] for gradient in gradients]
        p.grad = None if any(g is None for g in each) else torch.stack([g for g in each if g is not None]).mean(0)
    if max_grad_norm is not None:
        torch.nn.utils.clip_grad_norm_(named.values(), max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return torch.stack(losses).mean()

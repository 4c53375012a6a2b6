"""LookSAM: the part of SAM's gradient that changes slowly, reused in the steps between two ascents."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ssam_scale.masks import (
    BitMask,
    Subset,
    inner_product,
    masked_add_,
    masked_scatter_,
    masked_select,
    pack,
)
from ssam_scale.sharding import ShardedWeights

from .perturb import at_least_fp32, squares, zero_unless_
from .resolved_step import ResolvedStep


class LookSAM:
    """The component of SAM's gradient orthogonal to the plain one, added to plain gradients (arXiv 2203.02714).

    A step with an ascent knows the direction of g, the gradient at w, and g_s, the one at w + ε, of the perturbed
    weights. It leaves behind g_v = g_s − (⟨g_s, g⟩ / ‖g‖²) g, which changes slowly; a step between goes by
    g + α (‖g‖ / ‖g_v‖) g_v (the paper's Algorithm 1). With a mask all of this is about the perturbed weights alone:
    the others keep their plain gradient.

    Between steps it holds g_v in float32, of the perturbed weights of this process's shards; during a step with an
    ascent, ε instead.

    Args:
        sharding: where the weights live.
        parameters: all that are trained, by name.
    """

    def __init__(self, sharding: ShardedWeights, parameters: Mapping[str, nn.Parameter]) -> None:
        self._sharding, self._parameters = sharding, parameters
        self._parts: dict[str, Subset | None] = {}
        self._orthogonal: list[Tensor] = []  # parallel to them

    @torch.no_grad()
    def update(self, resolved: ResolvedStep, epsilon: list[Tensor]) -> None:
        """Compute g_v after the descent pass of a step with an ascent. Collective.

        Args:
            resolved: what the step did.
            epsilon: ε, as `Epsilon.computed` returned it; overwritten.

        Raises:
            ValueError: the backend shows copies of its gradients, to which nothing can be added.
        """
        self._parts = dict(resolved.plan.weights)
        radii = list(resolved.radii.values())
        if len(set(radii)) > 1:  # groups go the way of one gradient, each as far as its own radius
            torch._foreach_div_(epsilon, radii)
        gradients, device = self._gradients(), epsilon[0].device
        if any(a.data_ptr() != b.data_ptr() for a, b in zip(gradients, self._gradients(), strict=True) if a.numel()):
            raise ValueError("reuse between ascents needs float32 gradients with ZeRO stage 3, which copies others")
        sharp = at_least_fp32(masked_select(gradients, list(self._parts.values())))
        along = inner_product(sharp, epsilon)
        sums = torch.stack([along, squares(epsilon, device).sum(), squares(sharp, device).sum()])
        sums = self._sharding.shard_group.all_reduce(sums)
        torch._foreach_mul_(epsilon, sums[0] / sums[1])
        torch._foreach_sub_(sharp, epsilon)
        # Where there was no perturbation, or the gradient overflowed, there is nothing to learn.
        zero_unless_(sharp, (sums[1] > 0.0) & sums.isfinite().all())
        self._orthogonal = sharp

    @torch.no_grad()
    def add(self, alpha: float) -> None:
        """Add α (‖g‖ / ‖g_v‖) g_v to the gradients of a step without an ascent. Collective; before the first, nothing.

        Args:
            alpha: α, the length of what is added over that of the gradient.
        """
        if not self._parts:
            return
        gradients, parts, device = self._gradients(), list(self._parts.values()), self._orthogonal[0].device
        plain = squares(masked_select(gradients, parts), device).sum()
        sums = self._sharding.shard_group.all_reduce(torch.stack([plain, squares(self._orthogonal, device).sum()]))
        ratio = alpha * (sums[0] / sums[1]).sqrt()
        scale = torch.where(ratio.isfinite(), ratio, torch.zeros_like(ratio))
        masked_add_(gradients, parts, self._orthogonal, alpha=scale)

    @torch.no_grad()
    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """`reused`: g_v by parameter, full; not a number where the last ascent perturbed nothing. Collective."""
        across = dict(zip(self._parts, self._orthogonal, strict=True))
        result = {}
        for name, p in self._parameters.items():
            [shard] = self._sharding.shards([p])
            local = torch.full_like(shard.weight, math.nan, dtype=torch.float32)
            if name in across:
                masked_scatter_([local], [self._parts[name]], [across[name]])
            result[name] = self._sharding.gather(p, local)
        return {"reused": result}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take back what `state_dict` returned, on any number of processes; without it there is nothing to reuse."""
        self._parts, self._orthogonal = {}, []
        saved = state_dict.get("reused", {})
        for name, p in self._parameters.items():  # in their order, in which norms are summed up
            if name not in saved:
                continue
            full = saved[name].to(p.device)
            known = ~full.isnan()
            if known.any():
                local = self._sharding.scatter(p, full)
                kept = self._sharding.scatter(p, known)
                part = None if known.all() else BitMask(pack(kept), kept.numel())
                self._parts[name] = part
                self._orthogonal += masked_select([local], [part])

    def _gradients(self) -> list[Tensor]:
        return self._sharding.gradients([self._parameters[name] for name in self._parts])

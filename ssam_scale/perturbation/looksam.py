"""LookSAM: the part of SAM's gradient that changes slowly, reused in the steps between two ascents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ssam_scale.masks import Plan, inner_product, masked_add_, masked_select
from ssam_scale.sharding import Sharding
from ssam_scale.sharding.chunks import Chunk

from .arithmetic import at_least_fp32, squares, zero_unless_
from .directions import Kept
from .live_gradients import live_gradients
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

    def __init__(self, sharding: Sharding, parameters: Mapping[str, nn.Parameter]) -> None:
        self._sharding, self._parameters = sharding, parameters
        self._orthogonal = Kept(sharding, parameters)

    @torch.no_grad()
    def update(self, resolved: ResolvedStep, epsilon: list[Tensor]) -> None:
        """Compute g_v after the descent pass of a step with an ascent. Collective.

        Args:
            resolved: what the step did.
            epsilon: ε, as `Epsilon.computed` returned it; overwritten.

        Raises:
            ValueError: the backend shows copies of its gradients, to which nothing can be added.
        """
        of_each = dict(zip(resolved.plan.weights, epsilon, strict=True))
        climbed = [name for name in of_each if resolved.radii[name] > 0.0]
        names, gradients = live_gradients(self._sharding, self._parameters, climbed, "reuse between ascents")
        plan = _only(resolved.plan, names)
        parts, epsilon = list(plan.weights.values()), [of_each[name] for name in names]
        if not names:
            return
        radii, device = [resolved.radii[name] for name in names], epsilon[0].device
        if len(set(radii)) > 1:  # groups go the way of one gradient, each as far as its own radius
            torch._foreach_div_(epsilon, radii)
        sharp = at_least_fp32(masked_select(gradients, parts))
        along = inner_product(sharp, epsilon)
        sums = torch.stack([along, squares(epsilon, device).sum(), squares(sharp, device).sum()])
        sums = self._sharding.shard_group.all_reduce(sums)
        torch._foreach_mul_(epsilon, sums[0] / sums[1])
        torch._foreach_sub_(sharp, epsilon)
        # Where there was no perturbation, or the gradient overflowed, there is nothing to learn.
        zero_unless_(sharp, (sums[1] > 0.0) & sums.isfinite().all())
        self._orthogonal.replace(plan, sharp)

    @torch.no_grad()
    def add(self, alpha: float) -> None:
        """Add α (‖g‖ / ‖g_v‖) g_v to the gradients of a step without an ascent. Collective; before the first, nothing.

        Args:
            alpha: α, the length of what is added over that of the gradient.
        """
        across = dict(
            zip(
                self._orthogonal.names(),
                zip(self._orthogonal.parts(), self._orthogonal.values(), strict=True),
                strict=True,
            )
        )
        names, gradients = live_gradients(self._sharding, self._parameters, across, "reuse between ascents")
        if not names:
            return
        parts, orthogonal = [across[name][0] for name in names], [across[name][1] for name in names]
        device = orthogonal[0].device
        plain = squares(masked_select(gradients, parts), device).sum()
        sums = self._sharding.shard_group.all_reduce(torch.stack([plain, squares(orthogonal, device).sum()]))
        ratio = alpha * (sums[0] / sums[1]).sqrt()
        scale = torch.where(ratio.isfinite(), ratio, torch.zeros_like(ratio))
        masked_add_(gradients, parts, orthogonal, alpha=scale)

    def state_dict(self) -> dict[str, dict[str, Tensor | Chunk]]:
        """`reused`: g_v by parameter; not a number where the last ascent perturbed nothing."""
        return {"reused": self._orthogonal.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take back what `state_dict` returned, on any number of processes; without it there is nothing to reuse."""
        self._orthogonal.load_state_dict(state_dict.get("reused", {}))


def _only(plan: Plan, names: Sequence[str]) -> Plan:
    """What a plan perturbs of these parameters."""
    return replace(
        plan, weights={name: plan.weights[name] for name in names}, counts={name: plan.counts[name] for name in names}
    )

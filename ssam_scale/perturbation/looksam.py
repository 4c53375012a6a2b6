"""LookSAM: the part of SAM's gradient that changes slowly, reused in the steps between two ascents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ssam_scale.masks import inner_product, masked_add_, masked_select
from ssam_scale.sharding import ShardedWeights

from .arithmetic import at_least_fp32, squares, zero_unless_
from .directions import Kept
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
        names, parts = list(resolved.plan.weights), list(resolved.plan.weights.values())
        radii = list(resolved.radii.values())
        if len(set(radii)) > 1:  # groups go the way of one gradient, each as far as its own radius
            torch._foreach_div_(epsilon, radii)
        gradients, device = self._gradients(names), epsilon[0].device
        if any(
            a.data_ptr() != b.data_ptr() for a, b in zip(gradients, self._gradients(names), strict=True) if a.numel()
        ):
            raise ValueError("reuse between ascents needs float32 gradients with ZeRO stage 3, which copies others")
        sharp = at_least_fp32(masked_select(gradients, parts))
        along = inner_product(sharp, epsilon)
        sums = torch.stack([along, squares(epsilon, device).sum(), squares(sharp, device).sum()])
        sums = self._sharding.shard_group.all_reduce(sums)
        torch._foreach_mul_(epsilon, sums[0] / sums[1])
        torch._foreach_sub_(sharp, epsilon)
        # Where there was no perturbation, or the gradient overflowed, there is nothing to learn.
        zero_unless_(sharp, (sums[1] > 0.0) & sums.isfinite().all())
        self._orthogonal.replace(resolved.plan, sharp)

    @torch.no_grad()
    def add(self, alpha: float) -> None:
        """Add α (‖g‖ / ‖g_v‖) g_v to the gradients of a step without an ascent. Collective; before the first, nothing.

        Args:
            alpha: α, the length of what is added over that of the gradient.
        """
        if not self._orthogonal:
            return
        gradients, parts = self._gradients(self._orthogonal.names()), self._orthogonal.parts()
        orthogonal = self._orthogonal.values()
        device = orthogonal[0].device
        plain = squares(masked_select(gradients, parts), device).sum()
        sums = self._sharding.shard_group.all_reduce(torch.stack([plain, squares(orthogonal, device).sum()]))
        ratio = alpha * (sums[0] / sums[1]).sqrt()
        scale = torch.where(ratio.isfinite(), ratio, torch.zeros_like(ratio))
        masked_add_(gradients, parts, orthogonal, alpha=scale)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """`reused`: g_v by parameter, full; not a number where the last ascent perturbed nothing. Collective."""
        return {"reused": self._orthogonal.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take back what `state_dict` returned, on any number of processes; without it there is nothing to reuse."""
        self._orthogonal.load_state_dict(state_dict.get("reused", {}))

    def _gradients(self, names: Sequence[str]) -> list[Tensor]:
        return self._sharding.gradients([self._parameters[name] for name in names])

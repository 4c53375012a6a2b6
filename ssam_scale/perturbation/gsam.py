"""GSAM: the descent also narrows the surrogate gap between the loss at w + ε and at w (arXiv 2203.08065)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ssam_scale.masks import inner_product, masked_add_, masked_select
from ssam_scale.sharding import Sharding

from .arithmetic import at_least_fp32, squares, zero_unless_
from .live_gradients import live_gradients
from .resolved_step import ResolvedStep


class SurrogateGap:
    """Takes off the descent gradient what the plain gradient has orthogonal to it.

    With g the gradient at w and g_s the one at w + ε, a step goes by g_s − α (g − (⟨g, g_s⟩ / ‖g_s‖²) g_s): the loss at
    w + ε falls as fast, and that at w rises, which narrows their gap (section 4 of the paper). With a mask it is about
    the perturbed weights, of which alone an ascent has to know g.

    Args:
        sharding: where the weights live.
        parameters: all that are trained, by name.
        alpha: α ≥ 0.
    """

    def __init__(self, sharding: Sharding, parameters: Mapping[str, nn.Parameter], alpha: float) -> None:
        self._sharding, self._parameters, self._alpha = sharding, parameters, alpha

    @torch.no_grad()
    def narrow(self, resolved: ResolvedStep, epsilon: list[Tensor], length: Tensor) -> None:
        """Change the gradients that the descent of a step with an ascent has left. Collective.

        Args:
            resolved: what the step did.
            epsilon: ε, as `Epsilon.computed` returned it; overwritten.
            length: by which g was divided for it, of shape ().

        Raises:
            ValueError: the backend shows copies of its gradients, to which nothing can be added.
        """
        # A group whose radius is 0 in this step has no ε to know its gradient by.
        of_each = dict(zip(resolved.plan.weights, epsilon, strict=True))
        climbed = [name for name in of_each if resolved.radii[name] > 0.0]
        names, gradients = live_gradients(self._sharding, self._parameters, climbed, "gap")
        parts, plain = [resolved.plan.weights[name] for name in names], [of_each[name] for name in names]
        if not plain:
            return
        torch._foreach_div_(plain, [resolved.radii[name] for name in names])
        torch._foreach_mul_(plain, length)
        sharp = at_least_fp32(masked_select(gradients, parts))
        sums = torch.stack([inner_product(plain, sharp), squares(sharp, sharp[0].device).sum()])
        sums = self._sharding.shard_group.all_reduce(sums)
        share = sums[0] / sums[1]
        torch._foreach_mul_(sharp, share)
        torch._foreach_sub_(plain, sharp)
        # Where there was no perturbation, or a gradient overflowed, the step is the descent's own.
        zero_unless_(plain, share.isfinite() & length.isfinite())
        masked_add_(gradients, parts, plain, alpha=length.new_full((), -self._alpha))

"""What a step keeps in the memory of one GPU: pure arithmetic on shapes.

Counted, in bytes: this process's part of the weights, of their gradients and of the base optimizer's state; the buffers
that gradients are reduced in; what is held gathered at once (`backends` says what that is); the mask, a bit a weight
where single weights are perturbed; the perturbed weights' backup, and ε where it is not in the place of the gradient;
what is kept for steps between two ascents; and the activations that one micro-batch keeps for its backward. Not
counted: buffers, what a kernel works with, what an allocator wastes, and whatever the communication library needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from .backends import costs_of
from .cluster import Spreading
from .weights import FLOAT, Ascent, Weights


@dataclass(frozen=True)
class Activations:
    """Bytes that autograd keeps in the forward of a whole pass: `fixed` and so many for each image."""

    fixed: float
    per_image: float

    def of(self, images: float) -> float:
        """For a forward of `images`."""
        return self.fixed + self.per_image * images


@dataclass(frozen=True)
class Footprint:
    """Bytes of memory of one GPU, of the step of a plan that takes most."""

    weights: float
    gradients: float
    optimizer: float
    gathered: float
    mask: float
    perturbation: float
    reuse: float
    activations: float

    @property
    def model(self) -> float:
        """Of the weights and what belongs to them, without what perturbing adds."""
        return self.weights + self.gradients + self.optimizer + self.gathered

    @property
    def perturbing(self) -> float:
        """Of what perturbing adds, but for weights that stay gathered for it."""
        return self.mask + self.perturbation + self.reuse

    @property
    def total(self) -> float:
        """Of everything counted."""
        return sum(float(getattr(self, field.name)) for field in fields(self))


def footprint(
    weights: Weights,
    ascents: Sequence[Ascent],
    spreading: Spreading,
    state_bytes_per_weight: float,
    activations: Activations,
    images: float,
    accumulation: int = 1,
) -> Footprint:
    """The memory of one GPU.

    Args:
        weights: all of them, by name.
        ascents: the kinds of steps of a plan; none: the base optimizer's.
        spreading: of the weights.
        state_bytes_per_weight: that the base optimizer keeps.
        activations: of a forward.
        images: of a micro-batch of one process.
        accumulation: micro-batches of a step.
    """
    held = costs_of(weights, spreading, accumulation).holds(ascents)
    return Footprint(
        weights=held.weights,
        gradients=held.gradients,
        optimizer=state_bytes_per_weight * held.stepped / FLOAT,
        gathered=held.gathered,
        mask=held.mask,
        perturbation=held.backup + held.epsilon,
        reuse=held.reuse,
        activations=activations.of(images),
    )

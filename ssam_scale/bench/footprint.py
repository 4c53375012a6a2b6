"""What a step keeps in the memory of one GPU: pure arithmetic on shapes.

Counted, in bytes: this process's part of the weights, of their gradients and of the base optimizer's state; the buckets
that DDP reduces gradients in; what FSDP2 holds gathered at once (the root's weights, the unit at work and the one
fetched ahead, and the gradient of a unit before it is reduced); the mask, a bit a weight where single weights are
perturbed; the perturbed weights' backup, and ε where it is not in the place of the gradient; and the activations that
one micro-batch keeps for its backward. Not counted: buffers, what a kernel works with, what an allocator wastes, and
whatever the communication library needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

from .cluster import Spreading
from .cost import FLOAT, Ascent, Weight, Weights


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
    activations: float

    @property
    def model(self) -> float:
        """Of the weights and what belongs to them, without what perturbing adds."""
        return self.weights + self.gradients + self.optimizer + self.gathered

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
) -> Footprint:
    """The memory of one GPU.

    Args:
        weights: all of them, by name.
        ascents: the kinds of steps of a plan; none: the base optimizer's.
        spreading: of the weights.
        state_bytes_per_weight: that the base optimizer keeps.
        activations: of a forward.
        images: of a micro-batch of one process.
    """
    shards = spreading.shards
    whole = sum(w.numel for w in weights.values())
    mine = sum(w.padded(shards) for w in weights.values()) / shards if spreading.backend == "fsdp2" else float(whole)
    perturbed = max((sum(a.perturbed.values()) for a in ascents), default=0) / shards
    partly, singly = any(a.partly for a in ascents), any(a.singly for a in ascents)
    # Who packs what others are to be sent knows the mask of all of the weights.
    known = mine + (whole if shards > 1 and any(a.between is not None for a in ascents) else 0)
    return Footprint(
        weights=FLOAT * mine,
        gradients=FLOAT * mine * (2 if spreading.backend == "ddp" else 1),
        optimizer=state_bytes_per_weight * mine,
        gathered=_gathered(weights.values(), spreading),
        mask=known / 8 if singly else 0.0,
        perturbation=FLOAT * perturbed * (2 if partly else 1),
        activations=activations.of(images),
    )


def _gathered(weights: Iterable[Weight], spreading: Spreading) -> float:
    if spreading.backend != "fsdp2" or spreading.shards == 1:
        return 0.0
    units: dict[int | None, int] = {}
    for w in weights:
        units[w.unit] = units.get(w.unit, 0) + w.padded(spreading.shards)
    root = units.pop(None, 0)
    blocks = sorted(units.values(), reverse=True)
    return float(FLOAT * (root + sum(blocks[:2]) + max([root, *blocks[:1]])))

"""Predicted time, bytes on the wire and memory of a step on a cluster: `step_cost` and `footprint`, pure functions.

A step is a sequence of segments, each of which computes for a time and sends something. How long a segment computes
comes from the measured times of the stages on one process (`compute`), by the number of images that it sees; what it
sends from the resolved step, the shapes of the weights and how the backend shards them (`backends`).

Assumptions of the time:

- A collective takes what a process sends by the ring algorithm (`collectives`) over the bandwidth of the slowest link
  of its group: the one between nodes, if the group does not fit into a node of consecutive ranks. Latency is not
  counted, nor are collectives of a few numbers (norms, whether gradients are finite).
- `seconds`: what a backend sends during a forward or backward is hidden behind it as far as that lasts, a segment
  taking the longer of the two; what it sends when nothing is computed is not hidden. `seconds_unhidden` is the sum, as
  if nothing were ever hidden. A real step lies between.
- Weights, gradients and what is sent of them are float32.
- Each backend sends what the docstring of its module says; with several micro-batches the collectives of a forward, and
  of a backward that gathers, come in each of them.
- In a LookSAM step without an ascent, adding what is reused takes as long as perturbing the same weights, and so does
  computing it after an ascent.

Counted in the memory of one GPU, in bytes: this process's part of the weights, of their gradients and of the base
optimizer's state; the buckets that gradients are reduced in; what is gathered at once (`backends` says what that is);
the mask, a bit a weight where single weights or rows are perturbed; the backup of the perturbed weights; what LookSAM
or a direction remembers, and ε where it is kept for LookSAM or GSAM; and the activations that one micro-batch keeps for
its backward. Not counted: buffers, what a kernel works with, what an allocator wastes, and what the communication
library needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from .backends import BackendCosts, PassTraffic, costs_of
from .cluster import Placement, Segment
from .compute import StepTimes, ascent_backward, ascent_forward, pass_seconds
from .workload import FLOAT, Ascent, Weights


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
    """Bytes of memory of one GPU, for the step of a plan that takes most."""

    weights: float
    gradients: float
    optimizer: float
    averages: float
    gathered: float
    mask: float
    perturbation: float
    reuse: float
    activations: float

    @property
    def model(self) -> float:
        """The weights, gradients, optimizer state, averaged weights and gathered copies: what takes no ascent."""
        return self.weights + self.gradients + self.optimizer + self.averages + self.gathered

    @property
    def perturbing(self) -> float:
        """What perturbing adds: the mask, the backup, and what is kept beside it."""
        return self.mask + self.perturbation + self.reuse

    @property
    def total(self) -> float:
        """All that is counted."""
        return sum(float(getattr(self, field.name)) for field in fields(self))


def footprint(
    weights: Weights,
    ascents: Sequence[Ascent],
    placement: Placement,
    state_bytes_per_weight: float,
    activations: Activations,
    images: float,
    accumulation: int = 1,
    averages: int = 0,
) -> Footprint:
    """The memory of one GPU.

    Args:
        weights: all of them, by name.
        ascents: the kinds of steps of a plan; none: the base optimizer's.
        placement: how the weights lie on the cluster.
        state_bytes_per_weight: that the base optimizer keeps.
        activations: of a forward.
        images: of a micro-batch of one process.
        accumulation: micro-batches of a step.
        averages: how many averages of the weights are kept, each sharded as the weights are (EMA's, MESA's).
    """
    held = costs_of(weights, placement, accumulation).memory(ascents)
    return Footprint(
        weights=held.weights,
        gradients=held.gradients,
        optimizer=state_bytes_per_weight * held.stepped / FLOAT,
        averages=averages * held.stepped,
        gathered=held.gathered,
        mask=held.mask,
        perturbation=held.backup,
        reuse=held.reuse,
        activations=replace(activations, fixed=max(0.0, activations.fixed + held.copies)).of(images),
    )


def step_segments(times: StepTimes, backend: BackendCosts, shards: int, ascent: Ascent | None) -> list[Segment]:
    """The segments of a step: ascent, perturbation, descent, base optimizer.

    Args:
        times: of the parts, for the micro-batches that one process sees in a step.
        backend: what it sends.
        shards: processes that stepping is sharded over.
        ascent: its ascent; None: a step of the base optimizer.
    """
    part = 1.0 if ascent is None else ascent.shape.descent
    forward = sum(s.forward for s in times.part(part))
    descent = _segments(forward, pass_seconds(times, part) - forward, backend.descent(ascent))
    segments = [*descent, Segment(times.optimizer / shards)]
    if ascent is None:
        return segments
    shape = ascent.shape
    perturb = times.perturb * shape.perturbed / backend.perturbing
    ascent_segments = _segments(ascent_forward(times, shape), ascent_backward(times, shape), backend.ascent(ascent))
    notes = [Segment((1 + ascent.reuses) * perturb)] if ascent.reuses else []
    return [*ascent_segments, Segment(perturb), *segments, *notes]


def _segments(forward: float, backward: float, sends: PassTraffic) -> list[Segment]:
    return [Segment(forward, sends.forward), Segment(backward, sends.backward), Segment(0.0, sends.after)]


@dataclass(frozen=True)
class StepCost:
    """What a mean step of a run costs.

    Attributes:
        seconds: with communication hidden behind compute as far as assumed.
        seconds_unhidden: with none of it hidden.
        bytes: that each process sends.
    """

    seconds: float
    seconds_unhidden: float
    bytes: float


def step_cost(
    times: StepTimes,
    weights: Weights,
    ascents: Sequence[Ascent],
    placement: Placement,
    accumulation: int = 1,
) -> StepCost:
    """The predicted cost of the mean step of a run.

    Args:
        times: of the parts, for the micro-batches that one process sees in a step.
        weights: all of them, by name.
        ascents: the kinds of its steps, whose shares add up to 1 or, the others being the base optimizer's, less.
        placement: how the weights lie on the cluster.
        accumulation: micro-batches of a step.
    """
    cluster, backend = placement.cluster, costs_of(weights, placement, accumulation)
    perturbing = [ascent for ascent in ascents if ascent.shape.ascends or ascent.shape.perturbed]
    kinds: list[tuple[float, Ascent | None]] = [(ascent.share, ascent) for ascent in perturbing]
    kinds.append((1.0 - sum(ascent.share for ascent in perturbing), None))
    weighted = [
        (share, segment) for share, kind in kinds for segment in step_segments(times, backend, placement.shards, kind)
    ]
    return StepCost(
        sum(share * segment.seconds(cluster) for share, segment in weighted),
        sum(share * segment.seconds(cluster, hidden=False) for share, segment in weighted),
        sum(share * segment.bytes for share, segment in weighted),
    )

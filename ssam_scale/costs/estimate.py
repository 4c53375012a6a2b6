"""What a step costs on a cluster: its time and its bytes on the wire, as pure functions.

A step is a sequence of legs, each of which computes for a time and sends something. How long a leg computes comes from
the measured times of the stages on one process (`predict`), in proportion to the images that it sees; what it sends
from the shapes of the weights, what the plan perturbs, and how the backend spreads the weights (`backends`).

Taken for granted:

- A collective takes what a process sends by the ring algorithm (`traffic`) over the bandwidth of the slowest link of
  its group: the one between nodes, if the group does not fit into a node of consecutive ranks. Latency is not counted,
  nor are collectives of a few numbers (norms, whether gradients are finite).
- `seconds`: what a backend sends during a forward or backward is hidden behind it as far as that lasts, a leg taking
  the longer of the two; what it sends when nothing is computed is not hidden. `seconds_unhidden` is the sum, as if
  nothing were ever hidden. A real step lies between.
- Weights, gradients and what is sent of them are float32.
- Each backend sends what the docstring of its module says; with several micro-batches the collectives of a forward, and
  of a backward that gathers, come in each of them.
- In a step that goes by what an earlier ascent brought, adding it takes as long as perturbing the same weights, and so
  does noting it after the ascent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from .backends import BackendCosts, InPass, costs_of
from .cluster import Leg, Spreading
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


def scaled(times: StepTimes, images: float) -> StepTimes:
    """Times for `images` times as many images."""
    stages = (
        replace(s, **{name: images * getattr(s, name) for name in ("forward", "backward", "no_weights", "no_input")})
        for s in times.stages
    )
    return replace(times, stages=tuple(stages))


def step_legs(times: StepTimes, backend: BackendCosts, shards: int, ascent: Ascent | None) -> list[Leg]:
    """A step: its ascent, if it has one, its descent, and the optimizer on this process's part of the weights.

    Args:
        times: of the parts, for the images that one process sees in a step.
        backend: what it sends.
        shards: processes that perturbing and stepping are spread over.
        ascent: what it does beyond the base optimizer's step.
    """
    forward = sum(s.forward for s in times.stages)
    descends = _legs(forward, pass_seconds(times) - forward, backend.descent(ascent))
    legs = [*descends, Leg(times.optimizer / shards)]
    if ascent is None:
        return legs
    shape = ascent.shape
    perturb = times.perturb * shape.perturbed / shards
    climbs = _legs(ascent_forward(times, shape), ascent_backward(times, shape), backend.ascent(ascent))
    notes = [Leg((1 + ascent.reuses) * perturb)] if ascent.reuses else []
    return [*climbs, Leg(perturb), *legs, *notes]


def _legs(forward: float, backward: float, sends: InPass) -> list[Leg]:
    return [Leg(forward, sends.forward), Leg(backward, sends.backward), Leg(0.0, sends.after)]


@dataclass(frozen=True)
class StepCost:
    """Of a mean step.

    Attributes:
        seconds: with what is sent hidden as far as assumed.
        seconds_unhidden: with nothing hidden.
        bytes: that each process sends.
    """

    seconds: float
    seconds_unhidden: float
    bytes: float


def step_cost(
    times: StepTimes,
    weights: Weights,
    ascents: Sequence[Ascent],
    spreading: Spreading,
    accumulation: int = 1,
) -> StepCost:
    """The mean step of a plan.

    Args:
        times: of the parts, for the images that one process sees in a step.
        weights: all of them, by name.
        ascents: the kinds of its steps, whose shares add up to 1 or, the others being the base optimizer's, less.
        spreading: of the weights.
        accumulation: micro-batches of a step.
    """
    cluster, backend = spreading.cluster, costs_of(weights, spreading, accumulation)
    climbing = [ascent for ascent in ascents if ascent.shape.ascends]
    kinds: list[tuple[float, Ascent | None]] = [(ascent.share, ascent) for ascent in climbing]
    kinds.append((1.0 - sum(ascent.share for ascent in climbing), None))
    weighted = [(share, leg) for share, kind in kinds for leg in step_legs(times, backend, spreading.shards, kind)]
    return StepCost(
        sum(share * leg.seconds(cluster) for share, leg in weighted),
        sum(share * leg.seconds(cluster, hidden=False) for share, leg in weighted),
        sum(share * leg.bytes for share, leg in weighted),
    )

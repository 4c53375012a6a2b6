"""What a step costs on a cluster: its time, its bytes on the wire and its memory, as pure functions.

A step is a sequence of legs, each of which computes for a time and sends something. How long a leg computes comes from
the measured times of the stages on one process (`predict`), in proportion to the images that it sees; what it sends
from the shapes of the weights, what the plan perturbs, and how the backend spreads the weights.

Taken for granted:

- A collective takes what a process sends by the ring algorithm (`traffic`) over the bandwidth of the slowest link of
  its group: the one between nodes, if the group does not fit into a node of consecutive ranks. Latency is not counted,
  nor are collectives of a few numbers.
- `seconds`: what a backend sends during a forward or backward is hidden behind it as far as that lasts, a leg taking
  the longer of the two. `seconds_unhidden` is the sum, as if nothing were ever hidden. A real step lies between.
- Weights, gradients and what is sent of them are float32.
- DDP reduces all gradients in the descent, and in the ascent what is perturbed, both while the backward goes on. FSDP2
  gathers every unit (block) for a forward and again for its backward, the root's own weights once, and reduces the
  gradients of what is perturbed, padded to whole rows of each process; of single weights and rows of weights, to the
  process that is sent most. With a shared prefix the root's weights are gathered twice more, once for each of the
  suffix's passes. With several micro-batches it gathers again for each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from .cluster import Leg, Sent, Spreading
from .predict import StepShape, StepTimes, ascent_backward, ascent_forward, pass_seconds

FLOAT = 4  # bytes


@dataclass(frozen=True)
class Weight:
    """One parameter.

    Attributes:
        shape: over all processes.
        stage: the first stage that uses it.
        unit: the block that FSDP2 gathers it with; None: the root's own.
    """

    shape: tuple[int, ...]
    stage: int
    unit: int | None

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    def padded(self, shards: int) -> int:
        """Elements over all processes when each has as many whole rows."""
        rows = self.shape[0] if self.shape else 1
        return -(-rows // shards) * shards * math.prod(self.shape[1:])


Weights = Mapping[str, Weight]


Between = Callable[[str, tuple[int, ...]], Sequence[int]]


@dataclass(frozen=True)
class Ascent:
    """What one kind of step does beyond the base optimizer's.

    Attributes:
        share: of the run's steps that are of this kind.
        shape: which stages run again and for which gradients; without an ascent, see `StepShape.ascends`.
        reduced: elements of the gradients that the ascent needs, whole, by parameter.
        perturbed: perturbed elements by parameter.
        partly: whether single elements or rows of parameters are perturbed, whose ε is a copy.
        singly: whether single elements are, which takes a bit for each.
        between: where backends send the perturbed elements of a gradient only: of a parameter of which some are, how
            many lie between each two neighbours of increasing positions. None: they send the whole.
        shares_prefix: whether the stages before the cut run once for both passes.
    """

    share: float
    shape: StepShape
    reduced: Mapping[str, int]
    perturbed: Mapping[str, int]
    partly: bool = False
    singly: bool = False
    between: Between | None = None
    shares_prefix: bool = False


def scaled(times: StepTimes, images: float) -> StepTimes:
    """Times for `images` times as many images."""
    stages = (
        replace(s, **{name: images * getattr(s, name) for name in ("forward", "backward", "no_weights", "no_input")})
        for s in times.stages
    )
    return replace(times, stages=tuple(stages))


def base_legs(times: StepTimes, weights: Weights, spreading: Spreading, accumulation: int = 1) -> list[Leg]:
    """A step of the base optimizer: forward, backward, and the optimizer on this process's part of the weights."""
    forward = sum(s.forward for s in times.stages)
    to_forward, to_backward = _gathers(weights, spreading, frozenset(weights), accumulation)
    reduced = _reductions(weights, {name: w.numel for name, w in weights.items()}, spreading)
    return [
        Leg(forward, to_forward),
        Leg(pass_seconds(times) - forward, (*to_backward, *reduced)),
        Leg(times.optimizer / spreading.shards),
    ]


def ascent_legs(
    times: StepTimes, weights: Weights, ascent: Ascent, spreading: Spreading, accumulation: int = 1
) -> list[Leg]:
    """What a step with this ascent has beyond the base optimizer's."""
    shape = ascent.shape
    if not shape.ascends:
        return []
    reduced = _reductions(weights, ascent.reduced, spreading, ascent.between)
    forward = {name for name, w in weights.items() if w.stage >= shape.cut}
    # FSDP2 gathers a unit ahead in a backward, one that does not need it, too; not across the cut of a shared prefix.
    ahead = 0 if ascent.shares_prefix else 1
    backward = {name for name, w in weights.items() if w.stage >= shape.first - ahead}
    to_forward, _ = _gathers(weights, spreading, forward, accumulation)
    _, to_backward = _gathers(weights, spreading, backward, accumulation)
    if ascent.shares_prefix:
        to_backward = (*to_backward, *_root_gathers(weights, spreading, 1))
    perturb = Leg(times.perturb * shape.perturbed / spreading.shards)
    return [
        Leg(ascent_forward(times, shape), to_forward),
        Leg(ascent_backward(times, shape), (*to_backward, *reduced)),
        perturb,
    ]


def _gathers(
    weights: Weights, spreading: Spreading, used: Iterable[str], times: int
) -> tuple[tuple[Sent, ...], tuple[Sent, ...]]:
    """What FSDP2 sends to have the units of these weights whole, in a forward and in a backward."""
    if spreading.backend != "fsdp2":
        return (), ()
    wanted = set(used)
    units = {weights[name].unit for name in wanted} - {None}
    blocks = _padded((w for w in weights.values() if w.unit in units), spreading)
    again = Sent("all_gather", times * blocks, spreading.of_a_copy)
    return (*_root_gathers(weights, spreading, times), again), (again,)


def _root_gathers(weights: Weights, spreading: Spreading, times: int) -> tuple[Sent, ...]:
    if spreading.backend != "fsdp2":
        return ()
    root = _padded((w for w in weights.values() if w.unit is None), spreading)
    return (Sent("all_gather", times * root, spreading.of_a_copy),)


def _padded(weights: Iterable[Weight], spreading: Spreading) -> float:
    return float(FLOAT * sum(w.padded(spreading.shards) for w in weights))


def _reductions(
    weights: Weights, reduced: Mapping[str, int], spreading: Spreading, between: Between | None = None
) -> tuple[Sent, ...]:
    if spreading.backend == "single":
        return ()
    if spreading.backend == "ddp":
        sent = sum(n if between is None else sum(between(name, (0, n))) for name, n in reduced.items())
        return (Sent("all_reduce", float(FLOAT * sent), spreading.everyone),)
    units: dict[int | None, list[str]] = {}
    for name, numel in reduced.items():
        if numel:
            units.setdefault(weights[name].unit, []).append(name)
    scattered = sum(_scattered(weights, names, spreading.shards, between) for names in units.values())
    live = _padded((weights[name] for names in units.values() for name in names), spreading)
    return (
        Sent("reduce_scatter", float(FLOAT * scattered), spreading.of_a_copy),
        Sent("all_reduce", live / spreading.shards, spreading.of_a_shard),
    )


def _scattered(weights: Weights, names: Sequence[str], shards: int, between: Between | None) -> int:
    """Elements of a unit's gradients over all processes, each sent as many as the one that is sent most."""
    if between is None:
        return sum(weights[name].padded(shards) for name in names)
    totals = [0] * shards
    for name in names:
        w = weights[name]
        bounds = tuple(min(i * w.padded(shards) // shards, w.numel) for i in range(shards + 1))
        totals = [total + n for total, n in zip(totals, between(name, bounds), strict=True)]
    return shards * max(totals)


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
    cluster = spreading.cluster
    weighted = [(1.0, leg) for leg in base_legs(times, weights, spreading, accumulation)]
    for ascent in ascents:
        weighted += [(ascent.share, leg) for leg in ascent_legs(times, weights, ascent, spreading, accumulation)]
    return StepCost(
        sum(share * leg.seconds(cluster) for share, leg in weighted),
        sum(share * leg.seconds(cluster, hidden=False) for share, leg in weighted),
        sum(share * leg.bytes for share, leg in weighted),
    )

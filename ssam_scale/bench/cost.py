"""What a step costs on a cluster: its time, its bytes on the wire and its memory, as pure functions.

A step is a sequence of legs, each of which computes for a time and sends something. How long a leg computes comes from
the measured times of the stages on one process (`predict`), in proportion to the images that it sees; what it sends
from the shapes of the weights, what the plan perturbs, and how the backend spreads the weights.

Taken for granted:

- A collective takes what a process sends by the ring algorithm (`traffic`) over the bandwidth of the slowest link of
  its group: the one between nodes, if the group does not fit into a node of consecutive ranks. Latency is not counted,
  nor are collectives of a few numbers.
- `seconds`: what a backend sends during a forward or backward is hidden behind it as far as that lasts, a leg taking
  the longer of the two. What it sends after a backward, as DDP's ascent does, is hidden behind nothing.
  `seconds_unhidden` is the sum of both, as if nothing were ever hidden. A real step lies between the two.
- Weights, gradients and what is sent of them are float32.
- DDP reduces all gradients in the descent, and in the ascent what is perturbed (single weights packed). FSDP2 gathers
  every unit (block) for a forward and again for its backward, the root's own weights once, and reduces the gradients of
  what is perturbed; rows are padded to a multiple of the processes. With a shared prefix the root's weights are
  gathered twice more, once for each of the suffix's passes. With several micro-batches it gathers again for each.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from .predict import StepShape, StepTimes, ascent_backward, ascent_forward, pass_seconds
from .traffic import ring_bytes

FLOAT = 4  # bytes
Placement = Literal["single", "ddp", "fsdp2"]


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


@dataclass(frozen=True)
class Ascent:
    """What one kind of step does beyond the base optimizer's.

    Attributes:
        share: of the run's steps that are of this kind.
        shape: which stages run again and for which gradients; without an ascent, see `StepShape.ascends`.
        reduced: elements of the gradients that the ascent needs, whole, by parameter.
        perturbed: perturbed elements by parameter.
        partly: whether single elements or rows of parameters are perturbed, whose ε is a copy.
        packs: whether a backend that can sends the perturbed elements of a gradient only.
        shares_prefix: whether the stages before the cut run once for both passes.
    """

    share: float
    shape: StepShape
    reduced: Mapping[str, int]
    perturbed: Mapping[str, int]
    partly: bool = False
    packs: bool = False
    shares_prefix: bool = False


@dataclass(frozen=True)
class Cluster:
    """Where a step runs.

    Attributes:
        gpus: processes, one a GPU.
        per_node: GPUs of one node.
        node_bandwidth: bytes per second that one GPU sends inside of its node.
        network_bandwidth: bytes per second that one GPU sends to another node.
    """

    gpus: int
    per_node: int
    node_bandwidth: float
    network_bandwidth: float


@dataclass(frozen=True)
class Group:
    """The processes of one collective.

    Attributes:
        size: how many they are.
        leaves_node: whether some are on other nodes.
    """

    size: int
    leaves_node: bool


@dataclass(frozen=True)
class Spreading:
    """How the weights lie on a cluster.

    Attributes:
        backend: how.
        replicas: copies of the weights that `fsdp2` keeps, each over consecutive ranks.
        cluster: where.

    Raises:
        ValueError: the backend or the number of replicas does not go with the number of GPUs.
    """

    backend: Placement
    replicas: int
    cluster: Cluster

    def __post_init__(self) -> None:
        gpus = self.cluster.gpus
        if self.backend == "single" and gpus > 1:
            raise ValueError(f"backend single on {gpus} GPUs; use ddp or fsdp2")
        if gpus % self.replicas:
            raise ValueError(f"{gpus} GPUs cannot hold {self.replicas} replicas")

    @property
    def shards(self) -> int:
        """Processes that one copy of the weights is spread over."""
        return self.cluster.gpus // self.replicas if self.backend == "fsdp2" else 1

    @property
    def everyone(self) -> Group:
        """All processes."""
        return Group(self.cluster.gpus, self.cluster.gpus > self.cluster.per_node)

    @property
    def of_a_copy(self) -> Group:
        """The processes of one copy."""
        return Group(self.shards, self.shards > self.cluster.per_node)

    @property
    def of_a_shard(self) -> Group:
        """The processes with the same part of different copies."""
        return Group(self.replicas, self.cluster.gpus > self.cluster.per_node)


@dataclass(frozen=True)
class Sent:
    """One collective, or several of a kind: the whole tensors' bytes together."""

    collective: str
    whole: float
    group: Group

    @property
    def bytes(self) -> float:
        """What each process sends."""
        return ring_bytes(self.collective, self.whole, self.group.size)

    def seconds(self, cluster: Cluster) -> float:
        """Over the slowest link of the group."""
        return self.bytes / (cluster.network_bandwidth if self.group.leaves_node else cluster.node_bandwidth)


@dataclass(frozen=True)
class Leg:
    """A part of a step: seconds of computing, what is sent, and whether the one hides behind the other."""

    computes: float
    sends: tuple[Sent, ...] = ()
    hides: bool = True

    @property
    def bytes(self) -> float:
        """What each process sends."""
        return sum(sent.bytes for sent in self.sends)

    def seconds(self, cluster: Cluster, *, hidden: bool = True) -> float:
        """How long it takes, on these assumptions."""
        sending = sum(sent.seconds(cluster) for sent in self.sends)
        return max(self.computes, sending) if hidden and self.hides else self.computes + sending


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
    packs = ascent.packs and spreading.backend == "ddp"
    reduced = _reductions(weights, ascent.perturbed if packs else ascent.reduced, spreading)
    forward = {name for name, w in weights.items() if w.stage >= shape.cut}
    # FSDP2 gathers a unit ahead in a backward, one that does not need it, too; not across the cut of a shared prefix.
    ahead = 0 if ascent.shares_prefix else 1
    backward = {name for name, w in weights.items() if w.stage >= shape.first - ahead}
    to_forward, _ = _gathers(weights, spreading, forward, accumulation)
    _, to_backward = _gathers(weights, spreading, backward, accumulation)
    if ascent.shares_prefix:
        to_backward = (*to_backward, *_root_gathers(weights, spreading, 1))
    perturb = Leg(times.perturb * shape.perturbed / spreading.shards)
    computing = ascent_backward(times, shape)
    if spreading.backend == "ddp":
        return [Leg(ascent_forward(times, shape)), Leg(computing, reduced, hides=False), perturb]
    return [Leg(ascent_forward(times, shape), to_forward), Leg(computing, (*to_backward, *reduced)), perturb]


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


def _reductions(weights: Weights, reduced: Mapping[str, int], spreading: Spreading) -> tuple[Sent, ...]:
    if spreading.backend == "single":
        return ()
    if spreading.backend == "ddp":
        return (Sent("all_reduce", float(FLOAT * sum(reduced.values())), spreading.everyone),)
    live = _padded((weights[name] for name, numel in reduced.items() if numel), spreading)
    scattered = Sent("reduce_scatter", live, spreading.of_a_copy)
    return (scattered, Sent("all_reduce", live / spreading.shards, spreading.of_a_shard))


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

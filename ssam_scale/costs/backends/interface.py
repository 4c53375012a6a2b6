"""The interface between the cost model and the backends."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, TypeVar

from ssam_scale.costs.cluster import Placement, Sent
from ssam_scale.costs.workload import FLOAT, Ascent, Weight, Weights
from ssam_scale.perturbation.directions import scope_of
from ssam_scale.sharding.packed_reduce_scatter import Shares

Sends = tuple[Sent, ...]


@dataclass(frozen=True)
class PassTraffic:
    """What each process sends in one of the two passes of a step.

    Attributes:
        forward: during the forward.
        backward: during the backward.
        after: when nothing is computed meanwhile: reductions that wait for the end of the backward, weights that others
            are told of.
    """

    forward: Sends = ()
    backward: Sends = ()
    after: Sends = ()


@dataclass(frozen=True)
class MemoryUse:
    """Bytes that one process holds for the step of a plan that takes most.

    Attributes:
        weights: of its part of the weights, and of a copy that the optimizer steps, where there is one.
        gradients: of gradients, and of the buffers that they are reduced in.
        stepped: of the weights that the optimizer keeps a state for on this process.
        gathered: of weights that are whole for a while, and of the whole gradients that belong to them.
        mask: of the mask's bits.
        backup: of the perturbed weights as they were.
        reuse: of what is kept for steps without an ascent, and of ε where that is kept through the descent.
        copies: of weights, cast by autocast, that are kept from a forward to its backward, more than on one process,
            where activations are measured with them; below 0 where the backend casts weights before it gathers them.
    """

    weights: float
    gradients: float
    stepped: float
    gathered: float = 0.0
    mask: float = 0.0
    backup: float = 0.0
    reuse: float = 0.0
    copies: float = 0.0


class BackendCosts(Protocol):
    """What a backend makes of a plan."""

    @property
    def perturbing(self) -> int:
        """Processes that share the work of perturbing one copy of the weights."""

    def ascent(self, ascent: Ascent) -> PassTraffic:
        """What the ascent pass sends, up to where every process has the perturbed weights."""

    def descent(self, ascent: Ascent | None) -> PassTraffic:
        """What the descent pass and the optimizer's step send.

        Args:
            ascent: the one before it; None: the base optimizer's step.
        """

    def floor(self, ascent: Ascent) -> Sends:
        """The least that a step with this ascent sends beyond one of the base optimizer, as weights lie on the backend.

        That is what its passes must gather and the base optimizer's step does not (where less is gathered, below 0),
        and of what dense SAM's ascent reduces, the density. Of what a plan's savings can change only what is kept
        gathered, where the ascent begins and whether it stays within a copy matter: leaving out another one costs what
        the step sends beyond this.
        """

    def memory(self, ascents: Sequence[Ascent]) -> MemoryUse:
        """What is held for steps with these ascents; none: for the base optimizer's."""


COSTS: dict[str, Callable[[Weights, Placement, int], BackendCosts]] = {}
"""What computes a backend's costs, by the backend's name."""

_Made = TypeVar("_Made", bound="Callable[[Weights, Placement, int], BackendCosts]")


def costs_for(*backends: str) -> Callable[[_Made], _Made]:
    """Register a class for these backends."""

    def register(made: _Made) -> _Made:
        COSTS.update(dict.fromkeys(backends, made))
        return made

    return register


@dataclass(frozen=True)
class Common:
    """What backends are asked about.

    Attributes:
        weights: all of them.
        placement: over which processes.
        accumulation: micro-batches of a step.
    """

    weights: Weights
    placement: Placement
    accumulation: int

    @property
    def perturbing(self) -> int:
        """Those that share the weights."""
        return self.placement.shards

    @property
    def numel(self) -> int:
        """Elements of all weights."""
        return sum(w.numel for w in self.weights.values())

    @cached_property
    def trained(self) -> Weights:
        """Those that are not frozen: gradients, the base optimizer's state and what it steps are of these alone."""
        return {name: w for name, w in self.weights.items() if w.trained}

    def whole_from(self, computed: Iterable[str]) -> int:
        """The stage from which on a backward for the gradients of these weights goes through everything.

        What a stage has beside its block lies before it, and in the last stage behind it.
        """
        first = min(self.weights[name].stages[0] for name in computed)
        return first + (first == max(w.stages[-1] for w in self.weights.values()))

    @property
    def trained_numel(self) -> int:
        """Elements of these."""
        return sum(w.numel for w in self.trained.values())

    def all_reduced(self, ascent: Ascent) -> Sends:
        """Of each gradient that an ascent asks for, the elements that it does, reduced by every process for itself."""
        if scope_of(ascent.resolved.direction) != "global":
            return ()  # each process climbs by its own
        sent = sum(sum(ascent.reduced_between(n, (0, self.weights[n].numel))) for n in ascent.resolved.reduced)
        return (Sent("all_reduce", float(FLOAT * sent), self.placement.world),)

    def all_reduced_floor(self, ascent: Ascent) -> Sends:
        """The same of what is perturbed, or where a step may go by it, of all: nothing is gathered."""
        if scope_of(ascent.resolved.direction) != "global" or not ascent.shape.ascends:
            return ()
        needed = self.trained_numel if ascent.resolved.by_hand else sum(ascent.perturbed.values())
        return (Sent("all_reduce", float(FLOAT * needed), self.placement.world),)

    def packing_knows(self, ascents: Sequence[Ascent], mine: float) -> float:
        """Weights that a process knows the mask of to pack what others are sent, beside those of its own part.

        They are all weights; and again as they lie in the buffers that are scattered, once of all processes and once of
        its own.

        Args:
            ascents: the kinds of steps of a plan.
            mine: elements of its part of those buffers.
        """
        shards = self.placement.shards
        packs = shards > 1 and any(ascent.between is not None for ascent in ascents)
        return self.trained_numel + (shards + 1) * mine if packs else 0.0

    def scattered(self, ascent: Ascent, names: Sequence[str], padded: Callable[[Weight], int]) -> Shares:
        """How a reduction of gradients of which not all is needed is shared out among the shards.

        Args:
            ascent: which needs some.
            names: of the gradients in a buffer.
            padded: elements of one over all processes, when each has as many.
        """
        shards = self.placement.shards
        totals = [0] * shards
        for name in names:
            w = self.weights[name]
            bounds = tuple(min(i * padded(w) // shards, w.numel) for i in range(shards + 1))
            totals = [total + n for total, n in zip(totals, ascent.reduced_between(name, bounds), strict=True)]
        return Shares.of(totals, sum(padded(self.weights[name]) for name in names) // shards)

    def passed_on(self, elements: float) -> Sends:
        """Sums that a process passes on to those who need them, the mean over processes."""
        group = self.placement.shard_group
        return (Sent("all_to_all", FLOAT * elements * group.size / max(group.size - 1, 1), group),) if elements else ()

    def needed_of(self, ascent: Ascent, names: Iterable[str], padded: Callable[[Weight], int]) -> int:
        """What must be reduced of gradients that are reduced together: what is perturbed, or whole ones with padding.

        Args:
            ascent: which perturbs some of it.
            names: of the weights.
            padded: elements of one over all processes, when each has as many.
        """
        if ascent.resolved.by_hand:  # a step may go by all of it
            return sum(padded(self.weights[name]) for name in names if name in self.trained)
        some = {name: ascent.perturbed[name] for name in names if ascent.perturbed.get(name)}
        if all(count == self.weights[name].numel for name, count in some.items()):
            return sum(padded(self.weights[name]) for name in some)
        return sum(some.values())


def perturbing(ascents: Sequence[Ascent], shards: int, known: float) -> dict[str, float]:
    """What perturbing and putting back take, where each process perturbs and remembers its own part.

    Args:
        ascents: the kinds of steps of a plan.
        shards: processes that one copy of the weights is sharded over.
        known: number of weights that this process knows the mask of.
    """
    perturbed = FLOAT * max((sum(a.perturbed.values()) for a in ascents), default=0) / shards
    # What LookSAM or a direction remembers; beside it ε, where that is looked at after the descent.
    remembered = any(a.reuses or a.resolved.direction.remembers for a in ascents)
    kept = any(a.reuses or a.resolved.keeps for a in ascents)
    return {
        "mask": known / 8 if any(a.has_bit_mask for a in ascents) else 0.0,
        "backup": perturbed,
        "reuse": perturbed * (remembered + kept),
    }

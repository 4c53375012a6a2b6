"""The input of the cost model: a network's parameters, and resolved steps with how often each kind comes."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ssam_scale.masks import BitMask, Plan, Rows, unpack
from ssam_scale.perturbation import ResolvedStep, StagedModel
from ssam_scale.sharding.low_precision import cast_parameters

from .compute import StepShape

FLOAT = 4  # bytes


@dataclass(frozen=True)
class Weight:
    """One parameter.

    Attributes:
        shape: over all processes.
        stages: that use it, rising; several for a tied weight.
        unit: the block that FSDP2 gathers it with; None: the root's own.
        group: index of its parameter group in the base optimizer.
        gathered: bytes of an element where a backend gathers it for a pass; it is float32 everywhere else.
        trained: whether it is not frozen.
    """

    shape: tuple[int, ...]
    stages: tuple[int, ...]
    unit: int | None
    group: int = 0
    gathered: int = FLOAT
    trained: bool = True

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    def padded(self, shards: int) -> int:
        """Elements over all processes when each has as many whole rows."""
        rows = self.shape[0] if self.shape else 1
        return -(-rows // shards) * shards * math.prod(self.shape[1:])


Weights = Mapping[str, Weight]
"""By name, in the order in which the optimizer has them."""


CountBetween = Callable[[str, tuple[int, ...]], Sequence[int]]


@dataclass(frozen=True)
class Ascent:
    """One kind of step with an ascent, and how often it comes in a run.

    Attributes:
        share: of the run's steps that are of this kind.
        resolved: what such a step does.
        shape: what of it takes time: `shape_of`.
        between: of a parameter that is perturbed, how many perturbed elements lie between each two neighbours of
            increasing positions; None: whole parameters are perturbed, or sent though less is.
        reuses: steps for each of this kind that reuse what it brought (LookSAM).
    """

    share: float
    resolved: ResolvedStep
    shape: StepShape
    between: CountBetween | None = None
    reuses: float = 0.0

    @property
    def perturbed(self) -> Mapping[str, int]:
        """Perturbed elements by parameter."""
        return self.resolved.plan.counts

    @property
    def has_bit_mask(self) -> bool:
        """Whether single elements or rows are, which takes a bit for each element of a GPU."""
        return self.resolved.plan.perturbs_subsets

    def perturbed_between(self, name: str, bounds: tuple[int, ...]) -> Sequence[int]:
        """How many elements of a perturbed parameter are to be sent from between each two neighbouring positions."""
        if self.between is not None:
            return self.between(name, bounds)
        return [end - start for start, end in itertools.pairwise(bounds)]

    def reduced_between(self, name: str, bounds: tuple[int, ...]) -> Sequence[int]:
        """The same of the gradient of one that is computed."""
        if self.between is not None and self.resolved.reduced.get(name) is not None:
            return self.between(name, bounds)
        return [end - start for start, end in itertools.pairwise(bounds)]


def weights_of(
    network: StagedModel, optimizer: torch.optim.Optimizer | None = None, precision: torch.dtype = torch.float32
) -> dict[str, Weight]:
    """All parameters of a network before it is sharded, by name.

    Args:
        network: in stages.
        optimizer: over its parameters, in their order; None: one with a single parameter group.
        precision: of the autocast that forwards run under; float32: there is none.
    """
    units = {id(p): index for index, stage in enumerate(network.stages) for p in stage.block.parameters()}
    groups = (
        {}
        if optimizer is None
        else {id(p): index for index, group in enumerate(optimizer.param_groups) for p in group["params"]}
    )
    stages = network.stages_of_parameters()
    cast = {id(p) for p in cast_parameters(network, precision)}
    return {
        name: Weight(
            tuple(p.shape),
            stages[name],
            units.get(id(p)),
            groups.get(id(p), 0),
            precision.itemsize if id(p) in cast else FLOAT,
            p.requires_grad,
        )
        for name, p in network.model.named_parameters()
    }


def ascent_of(
    resolved: ResolvedStep, weights: Weights, depth: int, *, share: float = 1.0, reuses: float = 0.0
) -> Ascent:
    """A resolved step with an ascent, as the cost model sees it.

    Args:
        resolved: what the step does.
        weights: of its network before it was sharded.
        depth: stages of the network.
        share: of all steps that are of this kind.
        reuses: steps for each of this kind that reuse what it brought (LookSAM).
    """
    between = _between(resolved.plan) if resolved.packed and resolved.plan.perturbs_subsets else None
    return Ascent(share, resolved, shape_of(resolved, weights, depth), between, reuses)


def shape_of(resolved: ResolvedStep, weights: Weights, depth: int) -> StepShape:
    """What of a resolved step takes compute time.

    A stage's share of computed weight gradients is by number of elements, a tied weight counting in every stage that
    uses it: each of its uses is a matrix product of its own.
    """
    return StepShape(
        resolved.forward_from,
        _shares(weights, depth, lambda name, stage: resolved.computed.get(name, 0) if stage >= resolved.cut else 0),
        resolved.plan.perturbed,
        resolved.fraction,
        resolved.scores_samples + resolved.scores_again,
        resolved.descent.fraction if resolved.descent is not None else 1.0,
    )


def trained_shares(weights: Weights, depth: int) -> tuple[float, ...]:
    """Of each stage, the share of its weights that is not frozen; counted as `shape_of` does."""
    return _shares(weights, depth, lambda name, stage: weights[name].numel if weights[name].trained else 0)


def _shares(weights: Weights, depth: int, elements: Callable[[str, int], int]) -> tuple[float, ...]:
    total, counted = [0] * depth, [0] * depth
    for name, w in weights.items():
        for stage in w.stages:
            total[stage] += w.numel
            counted[stage] += elements(name, stage)
    return tuple(c / n if n else 0.0 for c, n in zip(counted, total, strict=True))


def _between(plan: Plan) -> CountBetween:
    """See `Ascent.between`."""

    @functools.cache
    def before(name: str) -> torch.Tensor | None:
        """How many elements are perturbed before each position."""
        part = plan.weights[name]
        if part is None:
            return None
        assert isinstance(part, (BitMask, Rows))
        flags = unpack(part.packed) if isinstance(part, BitMask) else part.keep.repeat_interleave(part.size)
        return torch.cat([torch.zeros(1, dtype=torch.int64), flags.cumsum(0).cpu()])

    @functools.cache
    def between(name: str, bounds: tuple[int, ...]) -> list[int]:
        if (counts := before(name)) is None:
            return [end - start for start, end in itertools.pairwise(bounds)]
        return counts[torch.tensor(bounds)].diff().tolist()

    return between

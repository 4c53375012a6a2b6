"""What the cost model needs to know of a network and of the next step of a SparseSAM."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping

import torch

from ssam_scale.masks import Bits, Plan, Rows, unpack
from ssam_scale.perturbation import SparseSAM, StagedModel

from .predict import StepShape
from .weights import Ascent, Between, Weight, Weights


def weights_of(network: StagedModel, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Weight]:
    """All parameters of a network before it is spread, by name.

    Args:
        network: in stages.
        optimizer: over its parameters, in their order; None: one with a single parameter group.
    """
    units = {id(p): index for index, stage in enumerate(network.stages) for p in stage.block.parameters()}
    groups = (
        {}
        if optimizer is None
        else {id(p): index for index, group in enumerate(optimizer.param_groups) for p in group["params"]}
    )
    stages = network.stage_of_parameters()
    return {
        name: Weight(tuple(p.shape), stages[name], units.get(id(p)), groups.get(id(p), 0))
        for name, p in network.model.named_parameters()
    }


def ascent_of(
    opt: SparseSAM, weights: Weights, *, dense: bool, shares_prefix: bool, share: float = 1.0, plan: Plan | None = None
) -> Ascent:
    """What the next step does beyond the base optimizer's.

    Args:
        opt: the optimizer, on one process.
        weights: of its network before it was spread.
        dense: whether the ascent needs the gradient of every weight.
        shares_prefix: whether the stages before a cut run once for both passes.
        share: of all steps that are of this kind.
        plan: another one than the next step's.
    """
    plan = opt.plan if plan is None else plan
    depth = opt.pool.layout.depth
    if not any(opt.radii):
        return Ascent(share, StepShape(0, (0.0,) * depth, 0), frozenset(), frozenset(), {})
    cut = plan.cut if shares_prefix and not dense else 0
    elide = opt.levers.elide and not dense
    needed = frozenset(name for name in weights if dense or name in plan.weights)
    there = {name: w.numel for name, w in weights.items() if w.stage >= cut and (not elide or name in needed)}
    computed = dict(there)
    if elide:  # of rows, only those are computed
        computed |= {name: plan.counts[name] for name, part in plan.weights.items() if isinstance(part, Rows)}
    return Ascent(
        share,
        StepShape(cut, _shares(computed, weights, depth), plan.perturbed, opt.fraction),
        needed,
        frozenset(there),
        plan.counts,
        partly=plan.takes_parts,
        singly=any(isinstance(part, Bits) for part in plan.weights.values()),
        between=_between(plan) if plan.takes_parts and opt.levers.pack else None,
        dense=dense,
        shares_prefix=cut > 0,
        levers=opt.levers,
    )


def _between(plan: Plan) -> Between:
    """See `Ascent.between`."""

    @functools.cache
    def before(name: str) -> torch.Tensor | None:
        """How many elements are perturbed before each position."""
        part = plan.weights[name]
        if part is None:
            return None
        assert isinstance(part, (Bits, Rows))
        flags = unpack(part.packed) if isinstance(part, Bits) else part.keep.repeat_interleave(part.size)
        return torch.cat([torch.zeros(1, dtype=torch.int64), flags.cumsum(0).cpu()])

    @functools.cache
    def between(name: str, bounds: tuple[int, ...]) -> list[int]:
        if (counts := before(name)) is None:
            return [end - start for start, end in itertools.pairwise(bounds)]
        return counts[torch.tensor(bounds)].diff().tolist()

    return between


def _shares(computed: Mapping[str, int], weights: Weights, depth: int) -> tuple[float, ...]:
    """Of each stage, the share of its weights whose gradient is computed."""
    whole, kept = [0] * depth, [0] * depth
    for name, w in weights.items():
        whole[w.stage] += w.numel
        kept[w.stage] += computed.get(name, 0)
    return tuple(k / w if w else 0.0 for k, w in zip(kept, whole, strict=True))

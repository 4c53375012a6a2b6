"""What the cost model needs to know of a network and of the next step of a SparseSAM."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping

import torch

from ssam_scale.masks import Bits, Plan, Rows, unpack
from ssam_scale.perturbation import SparseSAM, StagedModel

from .cost import Ascent, Between, Weight, Weights
from .predict import StepShape


def weights_of(network: StagedModel) -> dict[str, Weight]:
    """All parameters of a network before it is spread, by name."""
    units = {id(p): index for index, stage in enumerate(network.stages) for p in stage.block.parameters()}
    stages = network.stage_of_parameters()
    return {
        name: Weight(tuple(p.shape), stages[name], units.get(id(p))) for name, p in network.model.named_parameters()
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
        return Ascent(share, StepShape(0, (0.0,) * depth, 0), {}, {})
    cut = plan.cut if shares_prefix and not dense else 0
    elide = opt.levers.elide and not dense
    needed = {name: w.numel for name, w in weights.items() if dense or name in plan.weights}
    computed = {name: w.numel for name, w in weights.items() if w.stage >= cut and (not elide or name in needed)}
    if elide:  # of rows, only those are computed
        computed |= {name: plan.counts[name] for name, part in plan.weights.items() if isinstance(part, Rows)}
    shape = StepShape(cut, _shares(computed, weights, depth), plan.perturbed, opt.fraction)
    partly = any(part is not None for part in plan.weights.values())
    singly = any(isinstance(part, Bits) for part in plan.weights.values())
    between = _between(plan) if partly and opt.levers.pack and not dense else None
    return Ascent(share, shape, needed, plan.counts, partly, singly, between, cut > 0)


def _between(plan: Plan) -> Between:
    """See `Ascent.between`."""

    @functools.cache
    def between(name: str, bounds: tuple[int, ...]) -> list[int]:
        part = plan.weights[name]
        if part is None:
            return [end - start for start, end in itertools.pairwise(bounds)]
        assert isinstance(part, (Bits, Rows))
        flags = unpack(part.packed) if isinstance(part, Bits) else part.keep.repeat_interleave(part.size)
        before = torch.cat([torch.zeros(1, dtype=torch.int64), flags.cumsum(0).cpu()])
        return before[torch.tensor(bounds)].diff().tolist()

    return between


def _shares(computed: Mapping[str, int], weights: Weights, depth: int) -> tuple[float, ...]:
    """Of each stage, the share of its weights whose gradient is computed."""
    whole, kept = [0] * depth, [0] * depth
    for name, w in weights.items():
        whole[w.stage] += w.numel
        kept[w.stage] += computed.get(name, 0)
    return tuple(k / w if w else 0.0 for k, w in zip(kept, whole, strict=True))

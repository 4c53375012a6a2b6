"""From w to w + ε, with no more work than the plan asks for, and back to w."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from ssam_scale.masks import Plan, Rows, add_, put_, taken
from ssam_scale.sharding import Needed, Sharding, Written

from .mask_state import Choice
from .parameters import WeightPool
from .passes import Passes
from .perturb import Ascent, Known
from .phases import Phases
from .savings import Levers
from .skip_gradients import only_rows, without_gradient


class Climb:
    """The ascent pass, and the perturbation that follows from it.

    Args:
        sharding: where the weights live.
        pool: what can be perturbed.
        choice: the mask at work.
        ascent: makes ε.
        optimizer: of the weights, whose gradients are dropped in between.
        levers: which savings are made.
        phases: measures.
    """

    def __init__(
        self,
        sharding: Sharding,
        pool: WeightPool,
        choice: Choice,
        ascent: Ascent,
        optimizer: torch.optim.Optimizer,
        levers: Levers,
        phases: Phases,
    ) -> None:
        self._sharding, self._pool, self._choice, self._ascent = sharding, pool, choice, ascent
        self._optimizer, self._levers, self._phases = optimizer, levers, phases

    def ascend(self, plan: Plan, passes: Passes, *, dense: bool) -> tuple[Tensor, Known]:
        """The ascent pass at w.

        Args:
            plan: what is going to be perturbed.
            passes: of this step.
            dense: whether the gradient of every parameter is needed.

        Returns:
            The loss, and what there is a reduced gradient of.
        """
        parameters, stages, levers = self._pool.parameters, self._pool.layout.stages, self._levers
        narrow = levers.elide and not dense
        elided = [p for n, p in parameters.items() if n not in plan.weights and stages[n] >= passes.cut]
        layers = self._pool.layers if narrow else {}
        # What lies before the cut is cut off by itself.
        with without_gradient(elided if narrow else []), only_rows(layers, plan.weights), self._sending(plan, dense):
            loss = passes.ascend()
        partly = any(isinstance(part, Rows) and name in layers for name, part in plan.weights.items())
        packed = levers.pack and self._sharding.packs and plan.takes_parts
        return loss, "all" if dense else "perturbed" if partly or packed else "named"

    def _sending(self, plan: Plan, dense: bool) -> AbstractContextManager[None]:
        """Surrounds an ascent: what of it is sent to other processes."""
        every, levers = self._pool.parameters, self._levers
        needed = [every[name] for name in (every if dense else plan.weights)]
        local, whole = list(plan.weights.values()), self._choice.whole(plan)
        if dense or not levers.pack:
            local = whole = [None] * len(needed)
        kept = [p for name, p in every.items() if name not in plan.weights] if levers.keep_gathered else []
        return self._sharding.ascent(Needed(needed, local, whole, kept, levers.within_shard_group))

    @contextmanager
    def perturbed(
        self, plan: Plan, radii: Mapping[str, float], step: int, known: Known, *, keep: bool = False
    ) -> Iterator[list[Tensor]]:
        """The weights are w + ε inside and w again afterwards, bit for bit, whatever happens inside.

        Args:
            plan: what to perturb.
            radii: ρ by parameter.
            step: number of the step, from 0.
            known: what there is a gradient of.
            keep: whether to yield ε, as `Ascent.perturbation` makes it, and not nothing.
        """
        sharding = self._sharding
        try:
            with self._phases("perturb"), torch.no_grad():
                epsilon = self._ascent.perturbation(plan, radii, step, known)
                perturbed = [self._pool.parameters[name] for name in plan.weights]
                changing, changed = sharding.exposed(perturbed), self._choice.exposed(plan)
                backup = taken(changing, changed)
        except BaseException:
            sharding.forget_copies()  # an ascent may have left some for the descent
            raise
        try:
            with self._phases("perturb"), torch.no_grad():
                add_([shard.weight for shard in sharding.shards(perturbed)], list(plan.weights.values()), epsilon)
                kept = [e.clone() for e in epsilon] if keep else []  # ε may lie where the next gradient will
                del epsilon
                sharding.clear_gradients(self._optimizer)
                sharding.publish(
                    Written(perturbed, list(plan.weights.values()), changed) if self._levers.pack else None
                )
                # It remembers low-precision copies until its outermost context ends, which may be around the step.
                torch.clear_autocast_cache()
            yield kept
        finally:
            # Nothing in here waits for another process: this may be the only one that failed.
            with self._phases("perturb"), torch.no_grad():
                put_(changing, changed, backup)
                sharding.forget_copies()
                torch.clear_autocast_cache()

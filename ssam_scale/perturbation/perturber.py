"""The weights at w + ε for a while, and at w again afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from ssam_scale.masks import Plan
from ssam_scale.sharding import Sharding, Written

from .arithmetic import add_, put_, taken
from .ascent import Ascent
from .choice import Choice
from .phases import Phases
from .pool import WeightPool


class Perturber:
    """Perturbs by the ascent gradient that the backend holds.

    Args:
        sharding: where the weights live.
        pool: what can be perturbed.
        choice: the mask at work.
        ascent: makes ε.
        optimizer: of the weights, whose gradients are dropped in between.
        phases: measures.
        pack: whether to send other processes no more than the weights that were perturbed.
    """

    def __init__(
        self,
        sharding: Sharding,
        pool: WeightPool,
        choice: Choice,
        ascent: Ascent,
        optimizer: torch.optim.Optimizer,
        phases: Phases,
        pack: bool,
    ) -> None:
        self._sharding, self._pool, self._choice, self._ascent = sharding, pool, choice, ascent
        self._optimizer, self._phases, self._pack = optimizer, phases, pack

    @contextmanager
    def __call__(
        self, plan: Plan, radii: Mapping[str, float], step: int, *, dense: bool, keep: bool = False
    ) -> Iterator[list[Tensor]]:
        """The weights are w + ε inside and w again afterwards, bit for bit, whatever happens inside.

        Args:
            plan: what to perturb.
            radii: ρ by parameter.
            step: number of the step, from 0.
            dense: whether there is the whole gradient of every parameter, or only of what is perturbed.
            keep: whether to yield ε, as `Ascent.perturbation` makes it, and not nothing.
        """
        sharding = self._sharding
        try:
            with self._phases("perturb"), torch.no_grad():
                epsilon = self._ascent.perturbation(plan, radii, step, dense=dense)
                perturbed = [self._pool.parameters[name] for name in plan.weights]
                changing, changed = sharding.exposed(perturbed), self._choice.exposed(plan)
                backup = taken(changing, changed)
        except BaseException:
            sharding.forget_copies()  # an ascent may have left some for the descent
            raise
        try:
            with self._phases("perturb"), torch.no_grad():
                add_([shard.weight for shard in sharding.shards(perturbed)], list(plan.weights.values()), epsilon)
                kept = epsilon if keep else []
                del epsilon
                sharding.clear_gradients(self._optimizer)
                sharding.publish(Written(perturbed, list(plan.weights.values()), changed) if self._pack else None)
                # It remembers low-precision copies until its outermost context ends, which may be around the step.
                torch.clear_autocast_cache()
            yield kept
        finally:
            # Nothing in here waits for another process: this may be the only one that failed.
            with self._phases("perturb"), torch.no_grad():
                put_(changing, changed, backup)
                sharding.forget_copies()
                torch.clear_autocast_cache()

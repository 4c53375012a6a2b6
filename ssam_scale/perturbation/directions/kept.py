"""Vectors of the perturbed weights that are kept from step to step, while what is perturbed may change."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ssam_scale.masks import BitMask, Plan, Subset, masked_scatter_, masked_select, pack
from ssam_scale.sharding import ShardedWeights
from ssam_scale.sharding.chunks import Chunk


class Kept:
    """A number for each perturbed weight of this process's shards, float32, or float64 of float64 weights.

    Takes no memory for weights that were never perturbed. Where the mask is another than when the numbers were kept,
    those of weights that both have go on.

    Args:
        sharding: where the weights live.
        parameters: all that are trained, by name.
    """

    def __init__(self, sharding: ShardedWeights, parameters: Mapping[str, nn.Parameter]) -> None:
        self._sharding, self._parameters = sharding, parameters
        self._of: dict[str, tuple[Subset | None, Tensor]] = {}
        self._owners: dict[str, nn.Parameter] = {}

    def __bool__(self) -> bool:
        return bool(self._of)

    def names(self) -> list[str]:
        """Of the parameters of which there is anything, in the order in which it was kept."""
        return list(self._of)

    def parts(self) -> list[Subset | None]:
        """Of which elements of each, parallel to `names`; None: all of them."""
        return [part for part, _ in self._of.values()]

    def values(self) -> list[Tensor]:
        """What is kept, parallel to `names`: of shape (elements of the part,), or the shard's; may be written to."""
        return [values for _, values in self._of.values()]

    def take_over(self, before: Kept) -> None:
        """Keep what another has kept of parameters that are the same."""
        # Of those that are frozen now, too, as long as they are the same when they come back.
        self._owners = {**before._owners, **before._parameters}
        self._of = {
            n: kept for n, kept in before._of.items() if self._parameters.get(n, self._owners[n]) is self._owners[n]
        }

    def keep(self, plan: Plan, values: Sequence[Tensor]) -> None:
        """Keep these, of what a plan perturbs; what is kept of other parameters stays."""
        self._of.update(zip(plan.weights, zip(plan.weights.values(), values, strict=True), strict=True))

    def replace(self, plan: Plan, values: Sequence[Tensor]) -> None:
        """Keep these, and nothing else."""
        self._of = {}
        self.keep(plan, values)

    def of(self, plan: Plan) -> tuple[list[Tensor], list[Tensor | None]]:
        """What is kept of what a plan perturbs, and where nothing was.

        Returns:
            The numbers, of shape (elements of the part,) or the shard's, zeros where none were kept; may be written to,
            and then given to `keep`. And True for those, bool of the same shapes; None: all were kept.
        """
        values: list[Tensor] = []
        unknown: list[Tensor | None] = []
        for name, part in plan.weights.items():
            if name in self._of and self._of[name][0] is part:
                values.append(self._of[name][1])
                unknown.append(None)
                continue
            [there] = masked_select([self._spread(name)], [part])
            absent = there.isnan()
            values.append(there.masked_fill_(absent, 0.0))
            unknown.append(absent)
        return values, unknown

    def _spread(self, name: str) -> Tensor:
        """What is kept of a parameter in its places in the shard, and not a number elsewhere."""
        [shard] = self._sharding.shards([self._parameters[name]])
        dtype = torch.promote_types(shard.weight.dtype, torch.float32)
        local = torch.full_like(shard.weight, math.nan, dtype=dtype)
        if name in self._of:
            part, values = self._of[name]
            masked_scatter_([local], [part], [values])
        return local

    @torch.no_grad()
    def state_dict(self) -> dict[str, Tensor | Chunk]:
        """By parameter; not a number where nothing is kept."""
        return {name: self._sharding.chunk(p, self._spread(name)) for name, p in self._parameters.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state_dict` returned, on any number of processes; what is not in it is not kept."""
        self._of = {}
        for name, p in self._parameters.items():  # in their order, in which norms are summed up
            if name not in state:
                continue
            full = state[name].to(p.device)
            known = ~full.isnan()
            if known.any():
                local, here = self._sharding.scatter(p, full), self._sharding.scatter(p, known)
                part = None if known.all() else BitMask(pack(here), here.numel())
                self._of[name] = part, masked_select([local], [part])[0]


def begins_without(exists: Tensor, unknown: Sequence[Tensor | None], scale: Tensor | float) -> bool:
    """Whether there is no gradient for a mean to begin as, of weights of which none is kept (`Kept.of`).

    Such a mean would be known from then on, as zeros. The host waits for the device only where weights are new and
    losses are scaled: those overflow in first steps, and a `GradScaler` waits in each.

    Args:
        exists: whether the gradient does, of shape ().
        unknown: where nothing is kept yet, as `Kept.of` says.
        scale: of the losses, a number if it never changes.
    """
    return isinstance(scale, Tensor) and any(first is not None for first in unknown) and not exists

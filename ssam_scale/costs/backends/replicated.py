"""One process, and DDP: every process holds all of the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ssam_scale.costs.cluster import Sent
from ssam_scale.costs.workload import FLOAT, Ascent

from .interface import Common, Holding, InPass, costs_for, perturbing


@costs_for("single")
@dataclass(frozen=True)
class SingleCosts(Common):
    """Nobody to send anything to."""

    def ascent(self, ascent: Ascent) -> InPass:
        """Nothing."""
        return InPass()

    def descent(self, ascent: Ascent | None) -> InPass:
        """Nothing."""
        return InPass()

    def holds(self, ascents: Sequence[Ascent]) -> Holding:
        """Everything, once."""
        whole = FLOAT * self.numel
        return Holding(whole, whole, whole, **perturbing(ascents, 1, self.numel))


@costs_for("ddp")
@dataclass(frozen=True)
class DDPCosts(Common):
    """Gradients are all-reduced while the backward goes on: all of the descent's, what is perturbed of the ascent's."""

    def ascent(self, ascent: Ascent) -> InPass:
        """Of each gradient that is needed, the elements that are."""
        sent = sum(sum(ascent.reduced_between(n, (0, self.weights[n].numel))) for n in ascent.resolved.reduced)
        return InPass(backward=(Sent("all_reduce", FLOAT * sent, self.placement.everyone),))

    def descent(self, ascent: Ascent | None) -> InPass:
        """Of all gradients."""
        return InPass(backward=(Sent("all_reduce", FLOAT * self.numel, self.placement.everyone),))

    def holds(self, ascents: Sequence[Ascent]) -> Holding:
        """Everything, and the buckets that gradients are reduced in."""
        whole = FLOAT * self.numel
        return Holding(whole, 2 * whole, whole, **perturbing(ascents, 1, self.numel))

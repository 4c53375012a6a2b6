"""One process, and DDP: every process holds all of the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ssam_scale.costs.cluster import Sent
from ssam_scale.costs.workload import FLOAT, Ascent

from .interface import Common, MemoryUse, PassTraffic, Sends, costs_for, perturbing


@costs_for("single")
@dataclass(frozen=True)
class SingleCosts(Common):
    """One process: no communication."""

    def ascent(self, ascent: Ascent) -> PassTraffic:
        """No communication."""
        return PassTraffic()

    def descent(self, ascent: Ascent | None) -> PassTraffic:
        """No communication."""
        return PassTraffic()

    def floor(self, ascent: Ascent) -> Sends:
        """No communication."""
        return ()

    def memory(self, ascents: Sequence[Ascent]) -> MemoryUse:
        """Weights, gradients and optimizer state in full."""
        trained = FLOAT * self.trained_numel
        return MemoryUse(FLOAT * self.numel, trained, trained, **perturbing(ascents, 1, self.trained_numel))


@costs_for("ddp")
@dataclass(frozen=True)
class DDPCosts(Common):
    """Gradients are all-reduced while the backward goes on: all of the descent's, what is perturbed of the ascent's."""

    def ascent(self, ascent: Ascent) -> PassTraffic:
        """Of each gradient that is needed, the elements that are."""
        return PassTraffic(backward=self.all_reduced(ascent))

    def descent(self, ascent: Ascent | None) -> PassTraffic:
        """All-reduce of all gradients."""
        return PassTraffic(backward=(Sent("all_reduce", FLOAT * self.trained_numel, self.placement.world),))

    def floor(self, ascent: Ascent) -> Sends:
        """The density: nothing is gathered."""
        return self.all_reduced_floor(ascent)

    def memory(self, ascents: Sequence[Ascent]) -> MemoryUse:
        """Everything, and the buckets that gradients are reduced in."""
        trained = FLOAT * self.trained_numel
        return MemoryUse(FLOAT * self.numel, 2 * trained, trained, **perturbing(ascents, 1, self.trained_numel))

"""FSDP2 and HSDP: every parameter is split by rows over the processes of a copy; units are gathered to compute.

A unit (a block) is gathered for a forward and again for its backward, the root's own weights once for both, and in the
backward of an ascent one unit ahead, though nothing needs it. Gradients that there are of a unit are reduce-scattered
together, padded to whole rows of each process; of single weights and rows, to the process that is sent most. With
several copies of the weights the sums are then all-reduced between them, unless an ascent stays within its copy.

With a shared prefix the root's weights are gathered twice more, once for each of the suffix's passes. Units that stay
gathered are gathered once for the forward of the ascent, its backward and the forward of the descent; those of a shared
prefix once for all that the step does with them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from ssam_scale.costs.cluster import Sent
from ssam_scale.costs.workload import FLOAT, Ascent

from .interface import Common, MemoryUse, PassTraffic, Sends, costs_for, perturbing

Unit = int | None


@costs_for("fsdp2")
@dataclass(frozen=True)
class FSDP2Costs(Common):
    """Of what is gathered and scattered over the processes of a copy, and reduced over those of a shard."""

    def ascent(self, ascent: Ascent) -> PassTraffic:
        """Units from the cut on, gathered; the gradients that there are, reduced."""
        kept, shape = self._staying(ascent), ascent.shape
        # A unit ahead is gathered in a backward, one that does not need it, too; not across the cut of a shared prefix.
        ahead = 0 if ascent.resolved.shares_prefix else 1
        forward = self._units(shape.cut)
        if ascent.resolved.shares_prefix:  # where the root stays, the prefix's forward has gathered it
            forward -= {None} & kept
        backward = self._units(shape.first - ahead) - kept - {None}
        return PassTraffic(self._gathers(forward), self._gathers(backward) + self._reductions(ascent))

    def descent(self, ascent: Ascent | None) -> PassTraffic:
        """All units, gathered, but for those that have stayed; all gradients, reduced."""
        units, everything = self._units(0), self.weights.keys()
        reduced = self._scatter(self._padded(everything)) + self._between_copies(self._padded(everything))
        if ascent is None:
            return PassTraffic(self._gathers(units), self._gathers(units - {None}) + reduced)
        kept, prefix = self._staying(ascent), units - self._units(ascent.shape.cut)
        if not ascent.resolved.shares_prefix:
            return PassTraffic(self._gathers(units - kept), self._gathers(units - {None}) + reduced)
        # The prefix's forward, which the ascent shares, is one with the root; the suffix's gathers the root again.
        again = () if None in kept else self._gathers({None})
        forward = self._gathers(prefix | {None}) + self._gathers(units - prefix - kept - {None}) + again
        return PassTraffic(forward, self._gathers(units - (kept & prefix) - {None}) + reduced)

    def memory(self, ascents: Sequence[Ascent]) -> MemoryUse:
        """Its rows; gathered: the root, the unit at work, the one fetched ahead, a gradient, and units that stay."""
        shards = self.placement.shards
        mine = self._padded(self.weights) / shards
        # Who packs what others are to be sent knows the mask of all of the weights.
        known = mine + (self.numel if shards > 1 and any(a.between is not None for a in ascents) else 0)
        return MemoryUse(
            FLOAT * mine,
            FLOAT * mine,
            FLOAT * mine,
            max([self._gathered(frozenset()), *(self._gathered(self._staying(a)) for a in ascents)]),
            **perturbing(ascents, shards, known),
        )

    def _units(self, start: int) -> frozenset[Unit]:
        """Those that the stages from `start` on use, and the root."""
        return frozenset({None, *(w.unit for w in self.weights.values() if w.stages[-1] >= start)})

    def _staying(self, ascent: Ascent) -> frozenset[Unit]:
        """Units that are gathered once for both passes: those that nothing perturbs."""
        if not ascent.resolved.kept:
            return frozenset()
        return self._units(0) - {self.weights[name].unit for name in ascent.perturbed}

    def _gathered(self, staying: Collection[Unit]) -> float:
        if self.placement.shards == 1:
            return 0.0
        sizes: dict[Unit, int] = {None: 0}
        for w in self.weights.values():
            sizes[w.unit] = sizes.get(w.unit, 0) + w.padded(self.placement.shards)
        root = sizes.pop(None)
        kept = sum(sizes[unit] for unit in staying if unit is not None)
        at_work = sorted((size for unit, size in sizes.items() if unit not in staying), reverse=True)[:2]
        return float(FLOAT * (root + kept + sum(at_work) + max([root, *sizes.values()])))

    def _padded(self, names: Iterable[str]) -> int:
        return sum(self.weights[name].padded(self.placement.shards) for name in names)

    def _gathers(self, units: Collection[Unit]) -> Sends:
        whole = self._padded(name for name, w in self.weights.items() if w.unit in units)
        times = self.accumulation
        return (Sent("all_gather", float(FLOAT * times * whole), self.placement.shard_group),)

    def _reductions(self, ascent: Ascent) -> Sends:
        units: dict[Unit, list[str]] = {}
        for name in ascent.resolved.computed:
            units.setdefault(self.weights[name].unit, []).append(name)
        scattered = self._scatter(sum(self._scattered(ascent, names) for names in units.values()))
        if ascent.resolved.within_shard_group:
            return scattered
        return scattered + self._between_copies(self._padded(ascent.resolved.computed))

    def _scattered(self, ascent: Ascent, names: Sequence[str]) -> int:
        """Elements of a unit's gradients over all processes, each sent as many as the one that is sent most."""
        shards = self.placement.shards
        if ascent.between is None:
            return self._padded(names)
        totals = [0] * shards
        for name in names:
            w = self.weights[name]
            bounds = tuple(min(i * w.padded(shards) // shards, w.numel) for i in range(shards + 1))
            totals = [total + n for total, n in zip(totals, ascent.reduced_between(name, bounds), strict=True)]
        return shards * max(totals)

    def _scatter(self, elements: float) -> Sends:
        return (Sent("reduce_scatter", float(FLOAT * elements), self.placement.shard_group),)

    def _between_copies(self, elements: float) -> Sends:
        return (Sent("all_reduce", FLOAT * elements / self.placement.shards, self.placement.replica_group),)

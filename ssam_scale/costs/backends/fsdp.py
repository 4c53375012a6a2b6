"""FSDP2 and HSDP: every parameter is split by rows over the processes of a copy; units are gathered to compute.

A unit (a block) is gathered for a forward and again for its backward, the root's own weights once for both. Gradients
that are needed of a unit are reduce-scattered together, padded to whole rows of each process; of single weights and
rows, what is needed, shared out as `sharding.packed_reduce_scatter` says. What autocast would cast is cast before it is
gathered (`sharding.low_precision`); gradients are float32. With several copies of the weights the sums
are then all-reduced between them, unless an ascent stays within its copy.

With a shared prefix the root's weights are gathered for the prefix and the ascent, and once more when they were
perturbed. Units that stay gathered are gathered once for the forward of the ascent, its backward and the forward of the
descent; those of a shared prefix once for all that the step does with them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from ssam_scale.costs.cluster import Sent
from ssam_scale.costs.workload import FLOAT, Ascent

from .interface import Common, MemoryUse, PassTraffic, Sends, costs_for, perturbing

Unit = int | None


@costs_for("fsdp2")
@dataclass(frozen=True)
class FSDP2Costs(Common):
    """Of what is gathered and scattered over the processes of a copy, and reduced over those of a shard."""

    def ascent(self, ascent: Ascent) -> PassTraffic:
        """Units from the cut on, gathered; the gradients that are needed, reduced; nothing where there is no pass."""
        if not ascent.shape.ascends:
            return PassTraffic()
        kept, shape = self._staying(ascent), ascent.shape
        forward = self._units(shape.cut)
        if ascent.resolved.shares_prefix:  # whose forward has gathered the root
            forward -= {None}
        backward = self._gone_back_through(ascent.resolved.computed) - kept
        return PassTraffic(
            self._choices(ascent) + self._gathers(forward), self._gathers(backward) + self._reductions(ascent)
        )

    def _choices(self, ascent: Ascent) -> Sends:
        """What forwards without a graph gather that choose samples; the root stays for the pass that follows."""
        return self._gathers(self._units(0) - {None}) * ascent.shape.scores

    def descent(self, ascent: Ascent | None) -> PassTraffic:
        """All units, gathered, but for those that have stayed; all gradients, reduced."""
        units = self._units(0)
        mine = self._padded(self.trained) / self.placement.shards
        reduced = self._scatter(mine) + self._between_copies(mine)
        if ascent is not None and ascent.resolved.by_micro_batch:
            reduced *= self.accumulation  # what accumulates in a shard is reduced first
        if ascent is None or not ascent.shape.ascends:
            return PassTraffic(self._gathers(units), self._gathers(self._descended) + reduced)
        kept, prefix = self._staying(ascent), units - self._units(ascent.shape.cut)
        if not ascent.resolved.shares_prefix:
            return PassTraffic(self._gathers(units - kept), self._gathers(self._descended) + reduced)
        # The prefix's forward, which the ascent shares, is one with the root; the suffix's gathers a perturbed one.
        forward = self._gathers(prefix | {None}) + self._gathers(units - prefix - kept)
        return PassTraffic(forward, self._gathers(self._descended - (kept & prefix)) + reduced)

    def floor(self, ascent: Ascent) -> Sends:
        """Each unit gathered where its weights are used and were not there before, and the density of what is reduced.

        And what the forwards gather that choose samples.

        A unit is there from a forward on until it is freed, which is before its backward, and at the latest when its
        weights are perturbed. The root is not freed before its backward, nor is a unit before the descent's backward
        that a plan keeps gathered, or before its end if the ascent shares it.
        """
        kept, resolved = self._staying(ascent), ascent.resolved
        if not ascent.shape.ascends:
            return ()
        run, climbed = self._units(ascent.shape.cut), self._gone_back_through(resolved.computed)
        gathers = 0
        for unit in self._units(0):
            if unit is None:
                more = 0 if unit in kept else 1  # than the one of the base optimizer's step
            elif unit in kept:
                more = -1 if resolved.shares_prefix and unit in self._descended - run else 0
            else:
                more = (unit in run) + (unit in climbed)
            gathers += more * self._gathered_bytes({unit})
        shards = self.placement.shards
        units = [[name for name, w in self.weights.items() if w.unit == unit] for unit in self._units(0)]
        mine = sum(self.needed_of(ascent, names, lambda w: w.padded(shards)) for names in units) / shards
        between = () if resolved.within_shard_group else self._between_copies(mine)
        own = Sent("all_gather", float(self.accumulation * gathers), self.placement.shard_group)
        gathered = (own, *self._choices(ascent))
        if not resolved.by_micro_batch:
            return (*gathered, *self._scatter(mine), *between)
        whole = self._padded(self.trained) / shards  # of the descents, which are reduced one by one
        once_more = self._scatter(whole) + self._between_copies(whole)
        return (*gathered, *(self._scatter(mine) * self.accumulation + once_more * (self.accumulation - 1)))

    def memory(self, ascents: Sequence[Ascent]) -> MemoryUse:
        """Its rows; gathered: the root, the unit at work, the one fetched ahead, a gradient, and units that stay."""
        shards = self.placement.shards
        mine = self._padded(self.trained) / shards
        known = mine + self.packing_knows(ascents, mine)
        return MemoryUse(
            FLOAT * self._padded(self.weights) / shards,
            FLOAT * mine,
            FLOAT * mine,
            max([self._gathered(frozenset()), *(self._gathered(self._staying(a)) for a in ascents)]),
            copies=-float(sum((FLOAT - w.gathered) * w.numel for w in self.weights.values())),
            **perturbing(ascents, shards, known),
        )

    @cached_property
    def _descended(self) -> frozenset[Unit]:
        """Those that a descent's backward gathers."""
        return self._gone_back_through(self.trained)

    def _gone_back_through(self, computed: Collection[str]) -> frozenset[Unit]:
        """Those that a backward gathers for the gradients of these weights; not the root, which has stayed."""
        units = self._units(self.whole_from(computed)) | {self.weights[name].unit for name in computed}
        return units - {None}

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
        sizes = {unit: self._gathered_bytes({unit}) for unit in self._units(0)}
        gradient = FLOAT * max(self._padded(self._of_units({unit})) for unit in sizes)
        root = sizes.pop(None)
        kept = sum(sizes[unit] for unit in staying if unit is not None)
        at_work = sorted((size for unit, size in sizes.items() if unit not in staying), reverse=True)[:2]
        return float(root + kept + sum(at_work) + gradient)

    def _padded(self, names: Iterable[str]) -> int:
        return sum(self.weights[name].padded(self.placement.shards) for name in names)

    def _of_units(self, units: Collection[Unit]) -> list[str]:
        return [name for name, w in self.weights.items() if w.unit in units]

    def _gathered_bytes(self, units: Collection[Unit]) -> int:
        names, shards = self._of_units(units), self.placement.shards
        return sum(self.weights[name].gathered * self.weights[name].padded(shards) for name in names)

    def _gathers(self, units: Collection[Unit]) -> Sends:
        whole = self.accumulation * self._gathered_bytes(units)
        return (Sent("all_gather", float(whole), self.placement.shard_group),)

    def _reductions(self, ascent: Ascent) -> Sends:
        units: dict[Unit, list[str]] = {}
        for name, w in self.weights.items():
            if w.trained and name not in ascent.resolved.elided:
                units.setdefault(w.unit, []).append(name)
        scattered = [self._scattered(ascent, names) for names in units.values()]
        mine, passed_on = (sum(each) for each in zip(*scattered, strict=True))
        between = () if ascent.resolved.within_shard_group else self._between_copies(mine)
        times = self.accumulation if ascent.resolved.by_micro_batch else 1
        return (self._scatter(mine) + self.passed_on(passed_on) + between) * times

    def _scattered(self, ascent: Ascent, names: Sequence[str]) -> tuple[float, float]:
        """Elements of a unit's gradients that each process sums up, and those that it passes on."""
        shards, resolved = self.placement.shards, ascent.resolved
        computed = [name for name in names if name in resolved.computed]
        if len(computed) < len(names):  # a pass that does not use some of them: nothing is packed
            return self._padded(computed) / shards, 0.0
        needed = [name for name in computed if name in resolved.reduced]
        if ascent.between is None or all(resolved.reduced[name] is None for name in needed):
            return self._padded(needed) / shards, 0.0
        shares = self.scattered(ascent, needed, lambda w: w.padded(shards))
        return shares.width, shares.passed_on

    def _scatter(self, mine: float) -> Sends:
        return (Sent("reduce_scatter", float(FLOAT * self.placement.shards * mine), self.placement.shard_group),)

    def _between_copies(self, mine: float) -> Sends:
        return (Sent("all_reduce", FLOAT * mine, self.placement.replica_group),)

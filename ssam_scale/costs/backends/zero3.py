"""DeepSpeed's ZeRO, stage 3: every parameter is cut into equal runs of elements (DeepSpeed 0.19.8).

Small parameters ("persistent", up to `ZeroSettings.persistent` elements) are gathered together when the optimizer has
stepped, and stay. The others are gathered in a forward and stay until their backward, if fewer than
`ZeroSettings.reuse` elements are used in between, in this way: those of all later stages twice; else they are gathered
for the backward again. So small networks are gathered once a pass and the first stages of large ones twice. Gathers and
reductions go on while the pass computes; gathering the persistent ones does not.

The ascent gathers what it runs, and perturbing frees what was written to (all, where nothing is packed), the persistent
ones too. A shared prefix stays gathered from its forward to its backward if any whole pass of the network would stay.
Weights that nothing perturbs can stay from the ascent to the descent. What autocast would cast is cast before it is
gathered for a pass (`sharding.low_precision`), but not before DeepSpeed gathers what it has stepped. Gradients are
reduce-scattered in every micro-batch: those of a descent in full, of those of an ascent what is needed, all together,
shared out as `sharding.packed_reduce_scatter` says.

Taken for granted: the trace by which DeepSpeed knows what is used next is the right one for each kind of pass, which it
is from the third pass of a kind on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from ssam_scale.costs.cluster import Sent
from ssam_scale.costs.workload import FLOAT, Ascent

from .interface import Common, MemoryUse, PassTraffic, Sends, costs_for, perturbing


@costs_for("zero3")
@dataclass(frozen=True)
class ZeRO3Costs(Common):
    """What is gathered and scattered over all processes."""

    def ascent(self, ascent: Ascent) -> PassTraffic:
        """Stages from the cut on, gathered; the gradients that there are, reduced; and small weights, gathered anew."""
        shape = ascent.shape
        some = ascent.resolved.packed or ascent.resolved.kept
        freed = self._persistent & ascent.perturbed.keys() if some else self._persistent
        if not shape.ascends:
            return PassTraffic(after=self._gathers(freed, times=1))
        again = (self._regathered & self._gone_back_through(ascent.resolved.computed)) - self._staying(ascent)
        scored = self._gathers(self._large) * shape.scores
        return PassTraffic(
            scored + self._gathers(self._large & self._from_stage(shape.cut)),
            self._gathers(again) + self._needed(ascent),
            self._gathers(freed, times=self.accumulation if ascent.resolved.by_micro_batch else 1),
        )

    def descent(self, ascent: Ascent | None) -> PassTraffic:
        """All weights, gathered, but for those that have stayed; reduced gradients; small weights, gathered anew."""
        there: frozenset[str] = frozenset()
        descended = self._gone_back_through(self.trained)
        again = self._regathered & descended
        if ascent is not None and ascent.shape.ascends:
            suffix = self._from_stage(ascent.shape.cut)
            there = self._staying(ascent) & suffix
            if ascent.resolved.shares_prefix and not self._prefix_stays(ascent):
                again = (self._regathered & suffix) | ((self._large & descended) - suffix - self._staying(ascent))
        return PassTraffic(
            self._gathers(self._large - there),
            self._gathers(again) + self._scatters(self._padded(self.trained)),
            (Sent("all_gather", float(FLOAT * self._padded(self._persistent)), self.placement.world),),
        )

    def floor(self, ascent: Ascent) -> Sends:
        """What DeepSpeed gathers where it knows what is used next, and the density of what is reduced.

        Weights are gathered for the ascent and for the descent, once each or, where DeepSpeed frees them in between,
        twice; small ones anew if they were perturbed.
        """
        gathered = (*self.ascent(ascent).forward, *self.ascent(ascent).backward, *self.descent(ascent).forward)
        gathered += self.descent(ascent).backward
        whole = sum(sent.whole for sent in gathered if sent.collective == "all_gather")
        base = self.descent(None)
        whole -= sum(sent.whole for sent in base.forward + base.backward if sent.collective == "all_gather")
        whole += self._gathered_bytes(self._persistent & ascent.perturbed.keys())
        if not ascent.shape.ascends:
            return (Sent("all_gather", float(whole), self.placement.world),)
        shards = self.placement.shards
        elements = self.needed_of(ascent, self.weights, lambda w: -(-w.numel // shards) * shards)
        return (Sent("all_gather", float(whole), self.placement.world), *self._scatters(elements))

    def memory(self, ascents: Sequence[Ascent]) -> MemoryUse:
        """Its runs, twice (the optimizer steps copies), and of gradients; a bucket; and all that stays gathered."""
        shards, settings = self.placement.shards, self.placement.zero
        held, mine = self._padded(self.weights) / shards, self._padded(self.trained) / shards
        part = FLOAT * mine
        whole = 0.0
        if shards > 1:
            far = [self.weights[name].numel for name in self._regathered]
            at_work = min(sum(far), settings.prefetch + max(far, default=0))
            staying = max((self._elements(self._regathered & self._staying(a)) for a in ascents), default=0)
            whole = FLOAT * min(self.numel, self.numel - sum(far) + at_work + staying)
        extra = perturbing(ascents, shards, self.trained_numel / shards + self.packing_knows(ascents, mine))
        return MemoryUse(FLOAT * held + part, part + FLOAT * settings.reduce_bucket, part, whole, **extra)

    @cached_property
    def _persistent(self) -> frozenset[str]:
        """What DeepSpeed keeps gathered between steps."""
        return frozenset(name for name, w in self.weights.items() if w.numel <= self.placement.zero.persistent)

    @cached_property
    def _large(self) -> frozenset[str]:
        return frozenset(self.weights) - self._persistent

    @cached_property
    def _regathered(self) -> frozenset[str]:
        """What is freed between its forward and its backward, because too much is used in between."""
        after = dict.fromkeys(sorted({w.stages[0] for w in self.weights.values()}, reverse=True), 0)
        later = 0
        for stage in after:
            after[stage] = later
            later += self._elements(n for n, w in self.weights.items() if w.stages[0] == stage)
        return frozenset(n for n in self._large if 2 * after[self.weights[n].stages[0]] >= self.placement.zero.reuse)

    def _staying(self, ascent: Ascent) -> frozenset[str]:
        """What is gathered once for the ascent and the descent's forward: what is not perturbed."""
        return self._large & ascent.resolved.kept

    def _prefix_stays(self, ascent: Ascent) -> bool:
        return ascent.resolved.packed and 2 * self.numel <= self.placement.zero.reuse

    def _gone_back_through(self, computed: Iterable[str]) -> frozenset[str]:
        """What a backward needs for the gradients of these weights."""
        return self._from_stage(self.whole_from(computed)) | frozenset(computed)

    def _from_stage(self, stage: int) -> frozenset[str]:
        return frozenset(name for name, w in self.weights.items() if w.stages[-1] >= stage)

    def _elements(self, names: Iterable[str]) -> int:
        return sum(self.weights[name].numel for name in names)

    def _padded(self, names: Iterable[str]) -> int:
        """Elements over all processes when each has as many."""
        shards = self.placement.shards
        return sum(-(-self.weights[name].numel // shards) * shards for name in names)

    def _gathers(self, names: Iterable[str], times: int | None = None) -> Sends:
        times = self.accumulation if times is None else times
        return (Sent("all_gather", float(times * self._gathered_bytes(names)), self.placement.world),)

    def _gathered_bytes(self, names: Iterable[str]) -> int:
        return sum(self.weights[name].gathered * self._padded([name]) for name in names)

    def _needed(self, ascent: Ascent) -> Sends:
        """The gradients that are needed, in one bucket."""
        resolved, shards = ascent.resolved, self.placement.shards
        needed = [name for name in resolved.computed if name in resolved.reduced]
        if ascent.between is None or all(resolved.reduced[name] is None for name in needed):
            return self._scatters(self._padded(needed))
        shares = self.scattered(ascent, needed, lambda w: -(-w.numel // shards) * shards)
        return self._scatters(shards * shares.width) + self.passed_on(self.accumulation * shares.passed_on)

    def _scatters(self, elements: float) -> Sends:
        return (Sent("reduce_scatter", float(FLOAT * self.accumulation * elements), self.placement.world),)

"""DeepSpeed's ZeRO, stages 0 to 2: every process holds all of the weights (DeepSpeed 0.19.8 with its defaults).

Stage 0 all-reduces whole gradients when a backward is over: of an ascent those of the parameters that are needed.

In stages 1 and 2 the weights of a parameter group lie in one flat buffer, which is cut into equal parts; each process
steps one, and keeps the optimizer's state and a float32 copy of that part alone, in float32 too. Every gradient that
there is goes whole into a bucket and is all-reduced, not reduced to its owner, when the backward is over (stage 2: each
backward). After the optimizer's step the parts are gathered. The perturbed weights are sent to the others by their
owners, and put back by each process from its own copy of them, of the whole parameters: nothing is sent for that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ssam_scale.costs.cluster import Sent
from ssam_scale.costs.workload import FLOAT, Ascent, Weight

from .interface import Common, MemoryUse, PassTraffic, Sends, costs_for, perturbing

# Of stage 0: elements of gradients that are copied together to be reduced at once.
_STAGE_0_BUCKET = 500_000_000
# Parts of a flat buffer are padded to a multiple of so many elements.
_ALIGNED = 2


@costs_for("zero0")
@dataclass(frozen=True)
class ZeRO0Costs(Common):
    """Stage 0: whole gradients, reduced after the backward."""

    def ascent(self, ascent: Ascent) -> PassTraffic:
        """The gradients that are needed, whole: DeepSpeed reduces no parts of one."""
        return PassTraffic(after=self._reduced(self.weights[name].numel for name in ascent.resolved.reduced))

    def descent(self, ascent: Ascent | None) -> PassTraffic:
        """All gradients."""
        return PassTraffic(after=self._reduced([self.numel]))

    def memory(self, ascents: Sequence[Ascent]) -> MemoryUse:
        """Everything, and the bucket that gradients are reduced in."""
        whole = FLOAT * self.numel
        bucket = FLOAT * min(self.numel, _STAGE_0_BUCKET)
        return MemoryUse(whole, whole + bucket, whole, **perturbing(ascents, 1, self.numel))

    def _reduced(self, elements: Iterable[int]) -> Sends:
        return (Sent("all_reduce", float(FLOAT * sum(elements)), self.placement.world),)


@costs_for("zero1", "zero2")
@dataclass(frozen=True)
class ZeRO12Costs(Common):
    """Stages 1 and 2: whole gradients, reduced after the backward; what others stepped or perturbed, gathered."""

    def ascent(self, ascent: Ascent) -> PassTraffic:
        """The gradients that there are, and the perturbed weights."""
        return PassTraffic(after=self._reduced(ascent.resolved.computed) + self._published(ascent))

    def descent(self, ascent: Ascent | None) -> PassTraffic:
        """All gradients, and the stepped weights."""
        gathered = tuple(self._all_of(group) for group in self._groups())
        return PassTraffic(after=self._reduced(self.weights) + gathered)

    def memory(self, ascents: Sequence[Ascent]) -> MemoryUse:
        """All weights, a part of what is stepped, and a bucket of fixed size for gradients."""
        padded = sum(self._padded(group) for group in self._groups())
        part = FLOAT * padded / self.placement.shards
        # Stage 1 reduces in the last micro-batch, until when gradients are whole.
        waiting = FLOAT * self.numel if self.placement.backend == "zero1" and self.accumulation > 1 else 0
        bucket = FLOAT * self.placement.zero.reduce_bucket
        # What is put back are whole parameters, on every process, and so is the mask of them.
        extra = perturbing(ascents, self.placement.shards, padded / self.placement.shards + self.numel)
        extra["backup"] *= self.placement.shards
        return MemoryUse(FLOAT * padded + part, waiting + part + bucket, part, **extra)

    def _groups(self) -> list[dict[str, Weight]]:
        """The weights of each parameter group, in the order of the flat buffer."""
        groups: dict[int, dict[str, Weight]] = {}
        for name, w in self.weights.items():
            groups.setdefault(w.group, {})[name] = w
        return list(groups.values())

    def _padded(self, group: Mapping[str, Weight]) -> int:
        alignment = _ALIGNED * self.placement.shards
        return -(-sum(w.numel for w in group.values()) // alignment) * alignment

    def _reduced(self, names: Iterable[str]) -> Sends:
        times = self.accumulation if self.placement.backend == "zero2" else 1
        whole = FLOAT * times * sum(self.weights[name].numel for name in names)
        return (Sent("all_reduce", float(whole), self.placement.world),)

    def _all_of(self, group: Mapping[str, Weight]) -> Sent:
        return Sent("all_gather", float(FLOAT * self._padded(group)), self.placement.world)

    def _published(self, ascent: Ascent) -> Sends:
        """What was perturbed, as `PackedAllGather` sends it: gathered, or where that is less, broadcast by each."""
        sends: list[Sent] = []
        for group in self._groups():
            owned = self._perturbed_of_each(ascent, group)
            everything = sum(owned) == sum(w.numel for w in group.values())
            if everything or not ascent.resolved.packed:
                sends.append(self._all_of(group))
                continue
            gathered = Sent("all_gather", float(FLOAT * len(owned) * max(owned)), self.placement.world)
            broadcast = Sent("broadcast", float(FLOAT * sum(owned)), self.placement.world)
            sends.append(min(gathered, broadcast, key=lambda sent: sent.bytes))
        return tuple(sends)

    def _perturbed_of_each(self, ascent: Ascent, group: Mapping[str, Weight]) -> list[int]:
        """How many elements that are sent each process owns of a group."""
        size = self._padded(group) // self.placement.shards
        owned = [0] * self.placement.shards
        start = 0
        for name, w in group.items():
            if name in ascent.perturbed:
                first, last = start // size, (start + w.numel - 1) // size
                bounds = (0, *((process + 1) * size - start for process in range(first, last)), w.numel)
                for process, count in enumerate(ascent.perturbed_between(name, bounds), first):
                    owned[process] += count
            start += w.numel
        return owned

"""DeepSpeed's ZeRO, stages 0 to 2: every process holds all of the weights (DeepSpeed 0.19.8 with its defaults).

An ascent is DDP's in all of them: what is perturbed of the gradients is all-reduced while the backward goes on, every
process perturbs all weights, and puts them back from its own copy. A direction that is known where weights are stepped
alone (momentum, a mean) is gone along there in stages 1 and 2, and what was perturbed gathered. In a descent stage 0
all-reduces whole gradients when the backward is over. Under a gate the first pass is a descent's, after which stages 1
and 2 have left each process the gradients of what it steps: there, too, what was perturbed is gathered.

In stages 1 and 2 the weights of a parameter group lie in one flat buffer, which is cut into equal parts; each process
steps one, and keeps the optimizer's state and a float32 copy of that part alone, in float32 too. In a descent every
gradient goes whole into a bucket and is all-reduced, not reduced to its owner, when the backward is over (stage 2: each
backward). After the optimizer's step the parts are gathered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
        """Of each gradient that is needed, the elements that are."""
        return PassTraffic(backward=self.all_reduced(ascent))

    def descent(self, ascent: Ascent | None) -> PassTraffic:
        """All gradients; of micro-batches that descend by themselves, each time."""
        times = self.accumulation if ascent is not None and ascent.resolved.by_micro_batch else 1
        return PassTraffic(after=(Sent("all_reduce", float(FLOAT * times * self.trained_numel), self.placement.world),))

    def floor(self, ascent: Ascent) -> Sends:
        """The density: nothing is gathered."""
        return self.all_reduced_floor(ascent)

    def memory(self, ascents: Sequence[Ascent]) -> MemoryUse:
        """Everything, and the bucket that gradients are reduced in."""
        trained = FLOAT * self.trained_numel
        bucket = min(trained, FLOAT * _STAGE_0_BUCKET)
        return MemoryUse(FLOAT * self.numel, trained + bucket, trained, **perturbing(ascents, 1, self.trained_numel))


@costs_for("zero1", "zero2")
@dataclass(frozen=True)
class ZeRO12Costs(Common):
    """Stages 1 and 2: whole gradients of a descent, reduced after the backward; what others stepped, gathered."""

    @property
    def perturbing(self) -> int:
        """Each process perturbs all."""
        return 1

    def ascent(self, ascent: Ascent) -> PassTraffic:
        """Of each gradient that is needed, the elements that are; and what each perturbed by what it alone knows."""
        if ascent.resolved.by_hand:
            return PassTraffic(after=(self._reduced(self._each_backward), *self._published(ascent)))
        return PassTraffic(backward=self.all_reduced(ascent), after=self._published(ascent))

    def _published(self, ascent: Ascent) -> Sends:
        if ascent.resolved.direction.whole and not ascent.resolved.by_hand:
            return ()
        written = sum(ascent.perturbed.values()) if ascent.resolved.packed else self.trained_numel
        return (Sent("all_gather", float(FLOAT * written), self.placement.world),)

    def descent(self, ascent: Ascent | None) -> PassTraffic:
        """All gradients, and the stepped weights."""
        reduced = self._reduced(self._each_backward or (ascent is not None and ascent.resolved.by_micro_batch))
        gathered = FLOAT * sum(self._padded(group) for group in self._groups())
        return PassTraffic(after=(reduced, Sent("all_gather", float(gathered), self.placement.world)))

    @property
    def _each_backward(self) -> bool:
        """Whether gradients are reduced in each micro-batch, and not in the last one alone."""
        return self.placement.backend == "zero2"

    def _reduced(self, each: bool) -> Sent:
        """All gradients, whole: in each micro-batch, or once."""
        times = self.accumulation if each else 1
        return Sent("all_reduce", float(FLOAT * times * self.trained_numel), self.placement.world)

    def floor(self, ascent: Ascent) -> Sends:
        """The density: an all-reduce is a reduce-scatter to those who perturb, and a gathering of what they have."""
        return (*self.all_reduced_floor(ascent), *self._published(ascent))

    def memory(self, ascents: Sequence[Ascent]) -> MemoryUse:
        """All weights, a part of what is stepped, and for gradients a bucket of fixed size, or an ascent's whole."""
        padded = sum(self._padded(group) for group in self._groups())
        part = FLOAT * padded / self.placement.shards
        # Stage 1 reduces in the last micro-batch, until when gradients are whole.
        waiting = FLOAT * self.trained_numel if self.placement.backend == "zero1" and self.accumulation > 1 else 0
        gradients = waiting + part + FLOAT * self.placement.zero.reduce_bucket
        if any(not ascent.resolved.by_hand for ascent in ascents):  # which go past the bucket
            gradients = max(gradients, FLOAT * self.trained_numel)
        # Every process perturbs all, and knows the mask of all, but remembers what it reuses for its part alone.
        extra = perturbing(ascents, 1, padded / self.placement.shards + self.trained_numel)
        extra["reuse"] /= self.placement.shards
        frozen = self.numel - self.trained_numel
        return MemoryUse(FLOAT * (frozen + padded) + part, gradients, part, **extra)

    def _groups(self) -> list[dict[str, Weight]]:
        """The weights that are trained of each parameter group, in the order of the flat buffer."""
        groups: dict[int, dict[str, Weight]] = {}
        for name, w in self.trained.items():
            groups.setdefault(w.group, {})[name] = w
        return list(groups.values())

    def _padded(self, group: Mapping[str, Weight]) -> int:
        alignment = _ALIGNED * self.placement.shards
        return -(-sum(w.numel for w in group.values()) // alignment) * alignment

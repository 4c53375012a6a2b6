"""Sums over the samples of all processes, of which each process holds and adds up an equal slice."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssam_scale.config.mask_sections import SampleScore
from ssam_scale.sharding import Sharding

_BUCKET = 2**24  # elements that are sent together: 64 MiB


class ShardedSums:
    """Sums over samples of gradients or their squares; every process adds up an equal slice of all parameters.

    The parameters, one after the other, make flat buckets, of which every process owns one slice. A reduce-scatter in
    which the owner adds in the order of the samples, so that the bits do not depend on the number of processes.

    Args:
        sharding: where the weights live.
        parameters: whose gradients are added.
        kinds: `fisher` adds their squares, `gradient` adds them.
    """

    def __init__(self, sharding: Sharding, parameters: Sequence[nn.Parameter], kinds: Sequence[SampleScore]) -> None:
        self._sharding, self._parameters, self._group = sharding, parameters, sharding.data_parallel_group
        self._numels = [shard.numel for shard in sharding.shards(parameters)]
        self._buckets: list[list[int]] = []
        size = _BUCKET
        for index, numel in enumerate(self._numels):
            if size + numel > _BUCKET:
                self._buckets.append([])
                size = 0
            self._buckets[-1].append(index)
            size += numel
        self._sums: dict[SampleScore, list[Tensor]] = {kind: [] for kind in kinds}  # of every bucket

    def _slices(self, bucket: list[int]) -> list[int]:
        """How many elements of a bucket each process owns: equally many, the last ones fewer or none."""
        total = sum(self._numels[index] for index in bucket)
        each = -(-total // self._group.size)
        return [max(0, min(each, total - rank * each)) for rank in range(self._group.size)]

    def add(self, gradients: dict[int, Tensor], computing: int, factor: float) -> None:
        """Add one sample of each of the first `computing` processes, in their order. Collective.

        Args:
            gradients: full float32 gradients of this process's sample by index of the parameter; emptied.
            computing: processes whose sample counts.
            factor: on the gradients.
        """
        device = next(iter(gradients.values())).device if gradients else None
        for number, bucket in enumerate(self._buckets):
            slices = self._slices(bucket)
            flat = torch.cat([self._flat(gradients.pop(i, None), i, device) for i in bucket])
            own, counts = slices[self._group.rank], self._group.rank < computing
            received = [own if rank < computing else 0 for rank in range(self._group.size)]
            sent = slices if counts else [0] * self._group.size
            parts = self._group.all_to_all(flat if counts else flat[:0], sent, received)
            for kind, sums in self._sums.items():
                if number == len(sums):
                    sums.append(parts[0].new_zeros(own))
                for part in parts[:computing]:
                    part = part if factor == 1.0 else part * factor
                    # Two operations that round correctly. What fuses them may fuse for some elements only, by place.
                    sums[number].add_(part.square() if kind == "fisher" else part)

    def _flat(self, gradient: Tensor | None, index: int, device: torch.device | None) -> Tensor:
        if gradient is None:
            return torch.zeros(self._numels[index], device=device or self._parameters[index].device)
        return gradient.reshape(-1)

    def finite(self) -> bool:
        """Whether every sum is. Collective."""
        return all(
            self._group.all_gather_object(all(bool(s.isfinite().all()) for sums in self._sums.values() for s in sums))
        )

    def on_shards(self, kind: SampleScore) -> list[Tensor]:
        """Magnitudes of the sums, as local shards of the parameters; forgets the sums. Collective."""
        scores = []
        shards = self._sharding.shards(self._parameters)
        sums = self._sums.pop(kind)
        for bucket in self._buckets:
            slices, own = self._slices(bucket), sums.pop(0)
            full = torch.cat(self._group.all_gather(F.pad(own, (0, slices[0] - len(own)))))[: sum(slices)]
            for index, piece in zip(bucket, full.split([self._numels[i] for i in bucket]), strict=True):
                parameter = self._parameters[index]
                local = self._sharding.scatter(parameter, piece.reshape(self._sharding.full_shape(parameter)))
                score = torch.empty_like(shards[index].weight, dtype=torch.float32)
                scores.append(score.copy_(local).abs_())
        return scores

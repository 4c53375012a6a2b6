"""ZeRO stages 1 and 2: every rank holds full weights, as views of flat buffers, and its optimizer steps a partition.

- Ascent gradient: `.grad`, of which the masked elements are all-reduced here; DeepSpeed, which would reduce all of it,
  is kept from reducing as its own `coalesce_grad_reduction` keeps it.
- Perturbation: written to the parameters, on every rank the same, so there is nothing to publish. That sends as little
  as reducing to the owner of each partition and gathering what it perturbed, and it sends from every rank alike where
  a cut perturbs the partitions of few. The optimizer steps float32 masters and never sees it. In bf16 and fp16 each
  rank perturbs its partition, of which it has the masters, and publishes it.
- Restoring: each rank copies its full weights back.
- Cleared between the passes: `.grad` and the reduced gradients, to which the descent's would be added.

By hand (a closure, `perturbed`) the engine has reduced: the ascent gradient is this rank's partition alone, in
`averaged_gradients` (or, in bf16 with float32 accumulation, in `fp32_groups_gradient_flat_partition`). The perturbation
is written to this rank's partition of the flat buffer that the parameters are views of, and published by an all-gather
of the partitions, or of the masked elements of them. So it is where gradients are accumulated in another dtype than the
weights', which is not in `.grad`.

A shard is the run of a parameter that lies in this rank's partition; it may be empty.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ssam_scale.sharding.chunks import Chunk
from ssam_scale.sharding.interface import Shard, WrittenWeights
from ssam_scale.sharding.packed_all_gather import PackedAllGather, Run, WrittenParameter
from ssam_scale.torch_compat import all_gather_single

from .engine import BACKWARD_INTERNALS, ZeROTraining, check_internals
from .masters import FLOAT, FlatShards, Master, MasterState

_STAGES_1_2_INTERNALS = BACKWARD_INTERNALS | {
    "bit16_groups": "which parameters are trained, by group; the optimizer's own groups hold flat partitions instead",
    "bit16_groups_flat": "the flat buffers that the parameters are views of: a parameter's place is its address in one",
    "parallel_partitioned_bit16_groups": "the partitions of the flat buffers: this rank perturbs its own",
    "single_partition_of_fp32_groups": "the masters: they key the optimizer's state, and loading writes them",
    "averaged_gradients": "this rank's partition of the reduced gradient; safe_get_full_grad would gather all of it",
    "all_grad_tensors": "accumulates over backwards; without dropping it the descent gradient adds to the ascent's",
    "use_grad_accum_attribute": "whether gradients are somewhere else than in .grad",
    "_coalesce_grad_reduction": "keeps the hooks on gradients from reducing, as in engine.coalesce_grad_reduction",
}
_ENGINE_INTERNALS = {
    "inside_no_sync_ctxt": "keeps the engine from reducing after a backward; its no_sync refuses stage 2",
}
_BF16_INTERNALS = BACKWARD_INTERNALS | {  # bf16 with data_types.grad_accum_dtype fp32; the first four as above
    "bf16_groups": "as bit16_groups",
    "bf16_groups_flat": "as bit16_groups_flat",
    "bf16_partitioned_groups": "as parallel_partitioned_bit16_groups",
    "fp32_groups_flat_partition": "as single_partition_of_fp32_groups",
    "fp32_groups_gradient_flat_partition": "this rank's partition of the reduced gradient",
    "immediate_grad_update": "without it a backward through a shared prefix forgets the gradients of the suffix",
}


class _FlatBuffers(FlatShards, MasterState):
    """Weights as views of flat buffers, one a parameter group, each cut into one partition a rank.

    Args:
        groups: the parameters, by group.
        buffers: of each group.
        partitions: of each buffer, by rank.
        masters: what the optimizer steps in the place of this rank's partition, by group.
    """

    weights_replicated = True

    def __init__(
        self,
        groups: Sequence[Sequence[nn.Parameter]],
        buffers: Sequence[Tensor],
        partitions: Sequence[Sequence[Tensor]],
        masters: Sequence[Tensor],
    ) -> None:
        super().__init__()
        self._groups, self._buffers, self._partitions, self._masters = groups, buffers, partitions, masters
        self._packed_all_gather = PackedAllGather()
        self._group_of = {id(p): index for index, group in enumerate(groups) for p in group}

    def groups(self) -> list[list[nn.Parameter]]:
        """The parameters in the flat buffers, by group."""
        return [list(group) for group in self._groups]

    def shards(self, parameters: Sequence[nn.Parameter]) -> list[Shard]:
        """The run of each parameter in this rank's partition, flat; a frozen parameter in full on every rank."""
        result = []
        for p in parameters:
            if id(p) not in self._group_of:
                result.append(Shard(p.detach().reshape(-1), 0, p.numel()))
                continue
            in_partition, in_parameter, length = self._own_run(p)
            own = self._own_partition(self._group_of[id(p)])
            result.append(Shard(own.narrow(0, in_partition, length), in_parameter, p.numel()))
        return result

    def resident(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """The full parameters: every rank holds all of them."""
        return [p.detach() for p in parameters]

    def resident_gradients(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """Each parameter's `.grad`."""
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]

    def publish(self, written: WrittenWeights | None = None) -> None:
        """Gather every rank's partition into the flat buffers, or what was written to of it."""
        for group, buffer in enumerate(self._buffers):
            changes = None if written is None else self._changes(group, written)
            if changes is None:
                all_gather_single(buffer.detach(), self._own_partition(group))
            else:
                self._packed_all_gather(changes)

    def reshard(self) -> None:
        """There are no gathered copies: a forward reads the flat buffers."""

    def full_shape(self, parameter: nn.Parameter) -> torch.Size:
        """Its shape."""
        return parameter.shape

    def gather(self, parameter: nn.Parameter, local: Tensor) -> Tensor:
        """An all-reduce of the full tensor, unless the parameter is frozen and every rank has it."""
        if id(parameter) not in self._group_of:
            return local.reshape(parameter.shape)
        return super().gather(parameter, local)

    def chunk(self, parameter: nn.Parameter, local: Tensor) -> Tensor | Chunk:
        """This rank's run; all of a frozen parameter."""
        return super().chunk(parameter, local) if id(parameter) in self._group_of else local.reshape(parameter.shape)

    def master(self, parameter: nn.Parameter) -> Master:
        """The run in the master of this rank's partition."""
        group = self._group_of[id(parameter)]
        in_partition, _, length = self._own_run(parameter)
        return Master(self._masters[group], in_partition, length, group)

    def _own_partition(self, group: int) -> Tensor:
        return self._partitions[group][self.shard_group.rank].detach()

    def _own_run(self, parameter: nn.Parameter) -> tuple[int, int, int]:
        """Of this rank's run of a parameter: its start in the partition, its start in the parameter, its length.

        The place of a parameter is read off its address: with round_robin_gradients the order in the flat buffer is not
        that of the group.
        """
        group = self._group_of[id(parameter)]
        buffer, own = self._buffers[group], self._own_partition(group)
        place = (parameter.data_ptr() - buffer.data_ptr()) // buffer.element_size()
        partition = (own.data_ptr() - buffer.data_ptr()) // buffer.element_size()
        start, end = max(place, partition), min(place + parameter.numel(), partition + own.numel())
        if start >= end:
            return 0, 0 if partition < place else parameter.numel(), 0
        return start - partition, start - place, end - start

    def _runs(self, parameter: nn.Parameter) -> list[Run]:
        """The runs of a parameter that lie in one rank's partition each."""
        group = self._group_of[id(parameter)]
        buffer, length = self._buffers[group], self._own_partition(group).numel()
        place = (parameter.data_ptr() - buffer.data_ptr()) // buffer.element_size()
        end = place + parameter.numel()
        result = []
        for rank in range(place // length, -(-end // length)):
            first, last = max(place, rank * length), min(end, (rank + 1) * length)
            result.append((rank, first - place, last - first))
        return result

    def _changes(self, group: int, written: WrittenWeights) -> list[WrittenParameter] | None:
        """What was written to of a group; None where it is everything."""
        of_group = [i for i, p in enumerate(written.parameters) if self._group_of.get(id(p)) == group]
        if len(of_group) == len(self._groups[group]) and all(written.resident[i] is None for i in of_group):
            return None
        return [
            WrittenParameter(p.detach().view(-1), self._runs(p), written.resident[i], written.local[i])
            for i in of_group
            for p in [written.parameters[i]]
        ]


class ZeRO12(_FlatBuffers, ZeROTraining):
    """Stages 1 and 2."""

    def __init__(self, engine: Any) -> None:
        ZeROTraining.__init__(self, engine, _STAGES_1_2_INTERNALS)
        zero = engine.optimizer
        partitions, masters = zero.parallel_partitioned_bit16_groups, zero.single_partition_of_fp32_groups
        _FlatBuffers.__init__(self, zero.bit16_groups, zero.bit16_groups_flat, partitions, masters)
        check_internals(engine, _ENGINE_INTERNALS)
        if not zero.use_grad_accum_attribute:
            self.reduce_ascents()
            # What each rank has of low-precision weights of others it has without their masters.
            self.reduces_whole = self.packs_gradients and all(b.element_size() >= FLOAT for b in zero.bit16_groups_flat)

    @contextmanager
    def _without_reduction(self) -> Iterator[None]:
        self._engine.inside_no_sync_ctxt = self._zero._coalesce_grad_reduction = True
        try:
            yield
        finally:
            self._engine.inside_no_sync_ctxt = self._zero._coalesce_grad_reduction = False

    def gradients(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """This rank's run of each parameter's reduced gradient."""
        pieces = {group: self._pieces(group) for group in {self._group_of[id(p)] for p in parameters}}
        result = []
        for p in parameters:
            group, (in_partition, in_parameter, length) = self._group_of[id(p)], self._own_run(p)
            if p.grad is not None:  # reduced here and not by the engine, which leaves none
                result.append(p.grad.reshape(-1).narrow(0, in_parameter, length))
                continue
            piece = pieces[group].get(in_partition) if length else None
            result.append(self._own_partition(group).new_zeros(length) if piece is None else piece)
        return result

    def clear_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Drop `.grad` and the reduced gradients."""
        self._zero.zero_grad()
        for reduced in (self._zero.averaged_gradients, self._zero.all_grad_tensors):
            for group in reduced:
                reduced[group] = None

    def _pieces(self, group: int) -> dict[int, Tensor]:
        """The pieces that make this rank's partition of a group's gradient, one a parameter, by where they start."""
        pieces: dict[int, Tensor] = {}
        start = 0
        for piece in self._zero.averaged_gradients.get(group) or ():
            pieces[start] = piece.reshape(-1)
            start += piece.numel()
        return pieces


class ZeRO1BF16(_FlatBuffers, ZeROTraining):
    """Stage 1 in bf16 with gradients accumulated in float32, which the engine reduces.

    Raises:
        ValueError: gradients are not accumulated at once.
    """

    def __init__(self, engine: Any) -> None:
        ZeROTraining.__init__(self, engine, _BF16_INTERNALS)
        zero = engine.optimizer
        partitions, masters = zero.bf16_partitioned_groups, zero.fp32_groups_flat_partition
        _FlatBuffers.__init__(self, zero.bf16_groups, zero.bf16_groups_flat, partitions, masters)
        if not zero.immediate_grad_update:
            raise ValueError(
                "SparseSAM on a DeepSpeed engine with bf16, ZeRO stage 1 and fp32 gradient accumulation needs "
                "bf16.immediate_grad_update: true"
            )

    def gradients(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """This rank's run of each parameter's reduced gradient."""
        result = []
        for p in parameters:
            in_partition, _, length = self._own_run(p)
            partition = self._zero.fp32_groups_gradient_flat_partition[self._group_of[id(p)]]
            result.append(partition.narrow(0, in_partition, length))
        return result

    def clear_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Drop `.grad` and zero the float32 gradients that it was accumulated in."""
        self._zero.zero_grad()

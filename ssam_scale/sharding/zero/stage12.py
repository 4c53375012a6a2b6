"""ZeRO stages 1 and 2: whole weights on every rank, as views of flat buffers of which each rank steps one partition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ssam_scale.sharding.interface import Shard, Written
from ssam_scale.sharding.packing import PackedParameter, Packing

from .engine import _BACKWARD, Partitioned
from .masters import FlatShards, Master, _gather_runs

_STAGES_1_2 = _BACKWARD | {
    "bit16_groups": "which parameters are trained, by group; the optimizer's own groups hold flat parts instead",
    "bit16_groups_flat": "the flat buffers that the parameters are views of: a parameter's place is its address in one",
    "parallel_partitioned_bit16_groups": "the parts of the flat buffers: this process perturbs its own",
    "single_partition_of_fp32_groups": "what the optimizer steps: it keys the optimizer's state, and loading writes it",
    "averaged_gradients": "this process's part of the reduced gradient; safe_get_full_grad would gather all of it",
    "all_grad_tensors": "accumulates over backwards; without dropping it the descent gradient adds to the ascent's",
}
_STAGE_1_BF16_FP32 = _BACKWARD | {  # bf16 with data_types.grad_accum_dtype fp32; the first four as above
    "bf16_groups": "as bit16_groups",
    "bf16_groups_flat": "as bit16_groups_flat",
    "bf16_partitioned_groups": "as parallel_partitioned_bit16_groups",
    "fp32_groups_flat_partition": "as single_partition_of_fp32_groups",
    "fp32_groups_gradient_flat_partition": "this process's part of the reduced gradient",
    "immediate_grad_update": "without it a backward through a shared prefix forgets the gradients of the suffix",
}


class FlatBuffers(FlatShards):
    """The parameters of a group are views of one flat buffer, of which each process steps one part.

    Args:
        groups: the parameters, by group.
        buffers: of each group.
        parts: of each buffer, one a process.
        stepped: what the optimizer steps in the place of this process's part, by group.
    """

    exposes_whole = True

    def __init__(
        self,
        groups: Sequence[Sequence[nn.Parameter]],
        buffers: Sequence[Tensor],
        parts: Sequence[Sequence[Tensor]],
        stepped: Sequence[Tensor],
    ) -> None:
        super().__init__()
        self._groups, self._buffers, self._parts, self._stepped = groups, buffers, parts, stepped
        self._packing = Packing()
        self._group = {id(p): index for index, group in enumerate(groups) for p in group}

    def groups(self) -> list[list[nn.Parameter]]:
        """The parameters in the flat buffers, by group."""
        return [list(group) for group in self._groups]

    def _run(self, parameter: nn.Parameter) -> tuple[int, int, int]:
        """Of the local run: its start in this process's part, its start in the parameter, its length.

        The place of a parameter is read off its address: with round_robin_gradients the order in the flat buffer is not
        that of the group.
        """
        group = self._group[id(parameter)]
        buffer, own = self._buffers[group], self._own_part(group)
        place = (parameter.data_ptr() - buffer.data_ptr()) // buffer.element_size()
        part = (own.data_ptr() - buffer.data_ptr()) // buffer.element_size()
        start, end = max(place, part), min(place + parameter.numel(), part + own.numel())
        if start >= end:
            return 0, 0 if part < place else parameter.numel(), 0
        return start - part, start - place, end - start

    def _own_part(self, group: int) -> Tensor:
        return self._parts[group][self.shard_index].detach()

    def shards(self, parameters: Sequence[nn.Parameter]) -> list[Shard]:
        """The local run of each parameter, flat; a frozen one is whole everywhere."""
        result = []
        for p in parameters:
            if id(p) not in self._group:
                result.append(Shard(p.detach().reshape(-1), 0, p.numel()))
                continue
            in_part, in_parameter, length = self._run(p)
            own = self._own_part(self._group[id(p)])
            result.append(Shard(own.narrow(0, in_part, length), in_parameter, p.numel()))
        return result

    def gather(self, parameter: nn.Parameter, local: Tensor) -> Tensor:
        """An all-reduce of the whole, unless it is frozen."""
        if id(parameter) not in self._group:
            return local.reshape(parameter.shape)
        [shard] = self.shards([parameter])
        return _gather_runs(shard, local).reshape(parameter.shape)

    def whole_shape(self, parameter: nn.Parameter) -> torch.Size:
        """Its shape."""
        return parameter.shape

    def master(self, parameter: nn.Parameter) -> Master:
        """The run in the copy of this process's part."""
        group = self._group[id(parameter)]
        in_part, _, length = self._run(parameter)
        return Master(self._stepped[group], in_part, length, group)

    def exposed(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """The whole parameters: every process holds all of them."""
        return [p.detach() for p in parameters]

    def publish(self, written: Written | None = None) -> None:
        """Gather into the flat buffers every process's part, or what was written to of it."""
        for group, buffer in enumerate(self._buffers):
            changes = self._changes(group, written) if written is not None else None
            if changes is None:
                dist.all_gather_single(buffer.detach(), self._own_part(group))
            else:
                self._packing.exchange(changes)

    def _changes(self, group: int, written: Written) -> list[PackedParameter] | None:
        """What was written to of a group; None where it is everything."""
        of_group = [i for i, p in enumerate(written.parameters) if self._group.get(id(p)) == group]
        if len(of_group) == len(self._groups[group]) and all(written.whole[i] is None for i in of_group):
            return None
        return [
            PackedParameter(p.detach().view(-1), self._runs(p), written.whole[i], written.local[i])
            for i in of_group
            for p in [written.parameters[i]]
        ]

    def _runs(self, parameter: nn.Parameter) -> list[tuple[int, int, int]]:
        """(process, start, length) of the runs of a parameter that lie in one process's part each, in their order."""
        group = self._group[id(parameter)]
        buffer, length = self._buffers[group], self._own_part(group).numel()
        place = (parameter.data_ptr() - buffer.data_ptr()) // buffer.element_size()
        end = place + parameter.numel()
        result = []
        for process in range(place // length, -(-end // length)):
            first, last = max(place, process * length), min(end, (process + 1) * length)
            result.append((process, first - place, last - first))
        return result

    def forget_copies(self) -> None:
        """There are none: a forward reads the flat buffers."""


class ZeRO12(FlatBuffers, Partitioned):
    """Stages 1 and 2."""

    def __init__(self, engine: Any) -> None:
        Partitioned.__init__(self, engine, _STAGES_1_2)
        zero = engine.optimizer
        parts, stepped = zero.parallel_partitioned_bit16_groups, zero.single_partition_of_fp32_groups
        FlatBuffers.__init__(self, zero.bit16_groups, zero.bit16_groups_flat, parts, stepped)

    def gradients(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """The local run of each parameter's reduced gradient."""
        pieces = {group: self._pieces(group) for group in {self._group[id(p)] for p in parameters}}
        result = []
        for p in parameters:
            group, (in_part, _, length) = self._group[id(p)], self._run(p)
            piece = pieces[group].get(in_part) if length else None
            result.append(self._own_part(group).new_zeros(length) if piece is None else piece)
        return result

    def _pieces(self, group: int) -> dict[int, Tensor]:
        """The pieces that make this process's part of a group's gradient, one a parameter, by where they start."""
        pieces: dict[int, Tensor] = {}
        start = 0
        for piece in self._zero.averaged_gradients.get(group) or ():
            pieces[start] = piece.reshape(-1)
            start += piece.numel()
        return pieces

    def clear_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Forget `.grad` and the reduced gradient, which a second backward would be added to."""
        self._zero.zero_grad()
        for kept in (self._zero.averaged_gradients, self._zero.all_grad_tensors):
            for group in kept:
                kept[group] = None


class ZeRO1BF16(FlatBuffers, Partitioned):
    """Stage 1 in bf16 with gradients accumulated in float32.

    Raises:
        ValueError: gradients are not accumulated at once.
    """

    def __init__(self, engine: Any) -> None:
        Partitioned.__init__(self, engine, _STAGE_1_BF16_FP32)
        zero = engine.optimizer
        parts, stepped = zero.bf16_partitioned_groups, zero.fp32_groups_flat_partition
        FlatBuffers.__init__(self, zero.bf16_groups, zero.bf16_groups_flat, parts, stepped)
        if not zero.immediate_grad_update:
            raise ValueError(
                "SparseSAM on a DeepSpeed engine with bf16, ZeRO stage 1 and fp32 gradient accumulation needs "
                "bf16.immediate_grad_update: true"
            )

    def gradients(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """The local run of each parameter's reduced gradient."""
        result = []
        for p in parameters:
            in_part, _, length = self._run(p)
            part = self._zero.fp32_groups_gradient_flat_partition[self._group[id(p)]]
            result.append(part.narrow(0, in_part, length))
        return result

    def clear_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Drop `.grad` and zero what it was accumulated in."""
        self._zero.zero_grad()

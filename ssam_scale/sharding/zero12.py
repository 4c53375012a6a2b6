"""DeepSpeed ZeRO stages 1 and 2: the parameters of a group are views of one flat buffer, cut into equal parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from deepspeed.runtime.utils import all_gather_dp_groups
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from .base import Shard
from .zero import Spread

# Attributes of DeepSpeedZeroOptimizer (stages 1 and 2), and why each.
_INTERNALS = {
    "bit16_groups": "which parameters are trained, by group; the optimizer's own groups hold flat shards instead",
    "bit16_groups_flat": "the flat buffers that the parameters are views of: a parameter's place is its address in one",
    "parallel_partitioned_bit16_groups": "the parts of the flat buffers: this process perturbs its own",
    "averaged_gradients": "this process's part of the reduced gradient; safe_get_full_grad would gather all of it",
    "all_grad_tensors": "accumulates over backwards; without dropping it the descent gradient adds to the ascent's",
    "single_partition_of_fp32_groups": "what the optimizer steps: it keys the optimizer's state, and loading writes it",
    "real_dp_process_group": "publishing: argument of all_gather_dp_groups, as the optimizer's own step calls it",
    "nccl_start_alignment_factor": "publishing: argument of all_gather_dp_groups",
    "allgather_bucket_size": "publishing: argument of all_gather_dp_groups",
    "exit_backward": "a backward through a shared prefix enters two engine outputs but leaves one",
}


class ZeRO12(Spread):
    """Stages 1 and 2: the parameters of a group are views of one flat buffer, of which each process steps one part."""

    def __init__(self, engine: Any) -> None:
        if type(engine.optimizer) is not DeepSpeedZeroOptimizer:
            raise ValueError(f"ZeRO stages 1 and 2 with a {type(engine.optimizer).__name__} are not supported")
        super().__init__(engine, _INTERNALS)
        self._group = {id(p): index for index, group in enumerate(self._zero.bit16_groups) for p in group}

    def _trained_groups(self) -> list[list[nn.Parameter]]:
        return [list(group) for group in self._zero.bit16_groups]

    def _run(self, parameter: nn.Parameter) -> tuple[int, int, int]:
        """Of the local run: its start in this process's part, its start in the parameter, its length.

        The place of a parameter is read off its address: with round_robin_gradients the order in the flat buffer is not
        that of the group.
        """
        group = self._group[id(parameter)]
        flat, own = self._zero.bit16_groups_flat[group], self._own_part(group)
        place = (parameter.data_ptr() - flat.data_ptr()) // flat.element_size()
        part = (own.data_ptr() - flat.data_ptr()) // flat.element_size()
        start, end = max(place, part), min(place + parameter.numel(), part + own.numel())
        # Where there is no overlap, the empty run is at the parameter's nearer end.
        return max(start - part, 0), min(start - place, parameter.numel()), max(end - start, 0)

    def _own_part(self, group: int) -> Tensor:
        part: Tensor = self._zero.parallel_partitioned_bit16_groups[group][self.shard_index]
        return part.detach()

    def shards(self, parameters: Sequence[nn.Parameter]) -> list[Shard]:
        """The local run of each parameter, flat; a frozen one is whole everywhere."""
        result = []
        for p in parameters:
            if id(p) not in self._group:
                result.append(Shard(p.detach().reshape(-1), 0, p.numel()))
                continue
            in_part, in_parameter, length = self._run(p)
            own = self._own_part(self._group[id(p)])
            result.append(Shard(own.narrow(0, in_part, length) if length else own[:0], in_parameter, p.numel()))
        return result

    def gradients(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """The local run of each parameter's reduced gradient."""
        runs = [self._run(p) for p in parameters]
        groups = [self._group[id(p)] for p in parameters]
        pieces = {group: self._pieces(group) for group in set(groups)}
        result = []
        for (in_part, _, length), group in zip(runs, groups, strict=True):
            piece = pieces[group].get(in_part) if length else None
            result.append(torch.zeros(length, device=self._own_part(group).device) if piece is None else piece)
        return result

    def _pieces(self, group: int) -> dict[int, Tensor]:
        """The pieces that make this process's part of a group's gradient, one a parameter, by where they start."""
        pieces: dict[int, Tensor] = {}
        start = 0
        for piece in self._zero.averaged_gradients.get(group) or ():
            pieces[start] = piece.reshape(-1).float()  # in bf16 training gradients may be bf16; ε is not
            start += piece.numel()
        return pieces

    def gather(self, parameter: nn.Parameter, local: Tensor) -> Tensor:
        """An all-reduce of the whole, unless it is frozen."""
        return super().gather(parameter, local) if id(parameter) in self._group else local.reshape(parameter.shape)

    def _stepped(self, parameter: nn.Parameter) -> tuple[Tensor, int, int, int]:
        group = self._group[id(parameter)]
        in_part, _, length = self._run(parameter)
        return self._zero.single_partition_of_fp32_groups[group], in_part if length else 0, length, group

    def clear_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Forget `.grad` and the reduced gradient, which a second backward would be added to."""
        self._zero.zero_grad()
        for kept in (self._zero.averaged_gradients, self._zero.all_grad_tensors):
            for group in kept:
                kept[group] = None

    def exposed(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """The whole parameters: every process holds all of them."""
        return [p.detach() for p in parameters]

    def forget_copies(self) -> None:
        """There are none: a forward reads the flat buffers."""

    def publish(self) -> None:
        """Gather every process's part into the flat buffers, as at the end of the optimizer's step."""
        all_gather_dp_groups(
            groups_flat=self._zero.bit16_groups_flat,
            partitioned_param_groups=self._zero.parallel_partitioned_bit16_groups,
            dp_process_group=self._zero.real_dp_process_group,
            start_alignment_factor=self._zero.nccl_start_alignment_factor,
            allgather_bucket_size=self._zero.allgather_bucket_size,
        )

"""DeepSpeed ZeRO stage 3: every parameter is cut into equal runs, and whole only while a module computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.utils import safe_get_local_grad
from torch import Tensor, nn

from .base import Shard
from .zero import Spread, check_internals

# Attributes of DeepSpeedZeroOptimizer_Stage3, and why each.
_INTERNALS = {
    "fp16_groups": "which parameters are trained; the optimizer's own groups are empty between steps",
    "fp32_partitioned_groups_flat": "what the optimizer steps: it keys the optimizer's state, and loading writes it",
    "sub_group_to_group_id": "the parameter group of what the optimizer steps",
    "grad_partitions_flat_buffer": "keeps gradients of earlier passes, which parameters that a pass leaves out show",
    "empty_partition_cache": "frees gathered weights; the engine's method of that name collects garbage each time too",
    "persistent_parameters": "small parameters that stay gathered and would hide their changed parts",
    "exit_backward": "a backward through a shared prefix enters two engine outputs but leaves one",
}
# Attributes that DeepSpeed adds to the parameters, and why each.
_OF_PARAMETERS = {
    "ds_tensor": "the local part, padded to the same length everywhere; public calls reach the fp32 master only",
    "ds_numel": "elements of the whole, to tell weights from padding",
    "ds_shape": "shape of the whole",
    "all_gather": "gathers the persistent parameters again, as at the end of the optimizer's step",
}


class ZeRO3(Spread):
    """Stage 3.

    Raises:
        ValueError: the stage is one of DeepSpeed's variants of it.
        RuntimeError: this DeepSpeed is not one whose internals are known.
    """

    def __init__(self, engine: Any) -> None:
        if type(engine.optimizer) is not DeepSpeedZeroOptimizer_Stage3:
            raise ValueError(f"ZeRO stage 3 with a {type(engine.optimizer).__name__} is not supported")
        super().__init__(engine, _INTERNALS)
        check_internals(self._parameters()[0], _OF_PARAMETERS)
        self._place: dict[int, tuple[int, int]] = {}  # of each parameter: its sub-group, and where it starts in it
        for index, group in enumerate(self._zero.fp16_groups):
            start = 0
            for p in group:
                self._place[id(p)] = index, start
                start += p.ds_tensor.numel()

    def _trained_groups(self) -> list[list[nn.Parameter]]:
        groups: list[list[nn.Parameter]] = [[] for _ in range(self._groups)]
        for index, sub_group in enumerate(self._zero.fp16_groups):
            groups[self._zero.sub_group_to_group_id[index]] += sub_group
        return groups

    def whole_shape(self, parameter: nn.Parameter) -> torch.Size:
        """Its shape when it is gathered."""
        return torch.Size(parameter.ds_shape)  # type: ignore[attr-defined]

    def _stepped(self, parameter: nn.Parameter) -> tuple[Tensor, int, int, int]:
        index, start = self._place[id(parameter)]
        [shard] = self.shards([parameter])
        group = self._zero.sub_group_to_group_id[index]
        return self._zero.fp32_partitioned_groups_flat[index], start, shard.weight.numel(), group

    def shards(self, parameters: Sequence[nn.Parameter]) -> list[Shard]:
        """The local run of each parameter, flat, without the padding at its end."""
        result = []
        for p in parameters:
            part, numel = p.ds_tensor.detach(), int(p.ds_numel)  # type: ignore[attr-defined]
            start = min(self.shard_index * part.numel(), numel)
            result.append(Shard(part[: min(part.numel(), numel - start)], start, numel))
        return result

    def gradients(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """The local run of each parameter's reduced gradient."""
        lengths = [shard.weight.numel() for shard in self.shards(parameters)]
        return [safe_get_local_grad(p)[:length] for p, length in zip(parameters, lengths, strict=True)]

    def clear_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Forget `.grad` and zero the local gradients: a pass overwrites only those that it computes."""
        self._zero.zero_grad()
        self._zero.grad_partitions_flat_buffer.zero_()

    def exposed(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """The local runs, and what stays gathered."""
        mine = {id(p) for p in parameters}
        kept = [p.detach() for p in self._zero.persistent_parameters if id(p) in mine]
        return [shard.weight for shard in self.shards(parameters)] + kept

    def publish(self) -> None:
        """Free every gathered copy; gather again what DeepSpeed keeps gathered."""
        self.forget_copies()
        if kept := self._zero.persistent_parameters:
            kept[0].all_gather(kept)

    def forget_copies(self) -> None:
        """Free every gathered copy that is not kept."""
        self._zero.empty_partition_cache()

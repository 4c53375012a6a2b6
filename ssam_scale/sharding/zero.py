"""DeepSpeed ZeRO: the engine drives; the step perturbs what the engine's next forward reads.

| stage | spread over the processes | the ascent gradient | what a forward reads |
|---|---|---|---|
| 0 | nothing | `.grad` | the parameters |
| 1, 2 | optimizer state; in 2, gradients | own part of a flat gradient | parameters, which are views of a flat buffer |
| 3 | the weights too | own part of each parameter's | whole parameters, gathered from the parts |

Except for stage 0 in fp32, the optimizer steps weights that are kept apart from those that the forward uses. Only the
latter are perturbed, and put back by copy: the optimizer never sees w + ε. In bf16 and fp16 that makes it the usual
training with float32 master weights; a loss scale is in all gradients alike, and ε does not depend on it.

DeepSpeed has no public calls for most of this. What is used of its internals is listed below and in `gathered`, with
the reason, and looked for when a backend is constructed: another DeepSpeed fails there and not in the middle of
training.

Stages 1 to 3 hand flat pieces to the optimizer. One that treats every weight alike (SGD, AdamW, Lion) steps as anywhere
else; one that looks at whole tensors (LAMB, LARS, AdamP, Muon) computes something else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_local_grad
from torch import Tensor, nn

from . import gathered
from .base import Shard, Sharding, Unsharded
from .engine import Driven, Whole, check_setup
from .masters import FlatBuffers, FlatShards, Master, MasterWeights
from .needs import Needed, Written

# From, up to but without. 0.19.7 fails the tests: stage 3 on four processes is sporadically wrong (2 of 25 runs, none
# of 146 with 0.19.8), and bf16 with float32 accumulation raises where a gradient is not finite.
VERSIONS = ((0, 19, 8), (0, 20, 0))

# Internals by the class that DeepSpeed wraps the optimizer in.
_LOW_PRECISION_0 = {
    "fp16_groups": "which parameters are trained, by group; the optimizer's own groups hold float32 copies instead",
    "fp32_groups": "these copies: they key the optimizer's state, and loading writes them",
}
_BACKWARD = {"exit_backward": "a backward through a shared prefix enters two engine outputs but leaves one"}
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
_STAGE_3 = _BACKWARD | {
    "fp16_groups": "which parameters are trained; the optimizer's own groups are empty between steps",
    "fp32_partitioned_groups_flat": "what the optimizer steps: it keys the optimizer's state, and loading writes it",
    "sub_group_to_group_id": "the parameter group of what the optimizer steps",
    "grad_partitions_flat_buffer": "keeps gradients of earlier passes, which parameters that a pass leaves out show",
    "empty_partition_cache": "frees gathered weights; the engine's method of that name collects garbage each time too",
    "persistent_parameters": "small parameters that DeepSpeed keeps gathered between steps",
    "parameter_offload": "gathers and frees weights; `gathered` says what of it is used",
}
_STAGE_3_PARAMETER = {
    "ds_tensor": "the local part, padded to the same length everywhere; public calls reach the float32 master only",
    "ds_shape": "shape of the whole, which also tells weights from padding",
    "ds_numel": "elements of the whole",
}


def zero_sharding(engine: Any) -> Sharding:
    """The backend of a DeepSpeed engine.

    Args:
        engine: what `deepspeed.initialize` returned, ZeRO stage 0 to 3, with an optimizer.

    Raises:
        ValueError: the engine is set up in a way that is not supported; names the setting.
        RuntimeError: this DeepSpeed is not one whose internals are known.
    """
    _check_internals(engine, {})
    check_setup(engine)
    if engine.optimizer is engine.basic_optimizer:
        return ZeRO0(engine)
    wrapper = type(engine.optimizer).__name__
    if wrapper == "FP16_UnfusedOptimizer":
        return ZeRO0LowPrecision(engine)
    if wrapper == "DeepSpeedZeroOptimizer":
        return ZeRO12(engine)
    if wrapper == "BF16_Optimizer":
        return ZeRO1BF16(engine)
    if wrapper == "DeepSpeedZeroOptimizer_Stage3":
        return ZeRO3(engine)
    raise ValueError(f"SparseSAM on a DeepSpeed engine does not support its {wrapper}")


def _check_internals(owner: Any, internals: Mapping[str, str]) -> None:
    """Fail, once and with a list, where DeepSpeed is not the one that this file was written for."""
    numbers = (deepspeed.__version_major__, deepspeed.__version_minor__, deepspeed.__version_patch__)
    missing = [name for name in internals if not hasattr(owner, name)]
    if missing or not VERSIONS[0] <= numbers < VERSIONS[1]:
        low, high = (".".join(map(str, bound)) for bound in VERSIONS)
        what = f"; {type(owner).__name__} lacks {', '.join(missing)}" if missing else ""
        raise RuntimeError(
            f"DeepSpeed {deepspeed.__version__} is not supported: at least {low} and below {high} is needed{what}"
        )


class ZeRO0(Whole, Unsharded):
    """Stage 0 in fp32: everything is where autograd has it."""


class ZeRO0LowPrecision(Whole, MasterWeights, Unsharded):
    """Stage 0 in bf16: everything is where autograd has it, but the optimizer steps float32 copies."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        _check_internals(engine.optimizer, _LOW_PRECISION_0)
        self._groups = engine.optimizer.fp16_groups
        self._masters = {
            id(p): Master(master, 0, master.numel(), index)
            for index, groups in enumerate(zip(self._groups, engine.optimizer.fp32_groups, strict=True))
            for p, master in zip(*groups, strict=True)
        }

    def groups(self) -> list[list[nn.Parameter]]:
        """The model's parameters that the optimizer steps copies of, by group."""
        return [list(group) for group in self._groups]

    def master(self, parameter: nn.Parameter) -> Master:
        """The copy, whole."""
        return self._masters[id(parameter)]


class Spread(Driven):
    """What stages 1 to 3 have in common."""

    outlives_interruption = False

    def __init__(self, engine: Any, internals: Mapping[str, str]) -> None:
        super().__init__(engine)
        _check_internals(engine.optimizer, internals)
        self._zero = engine.optimizer

    def backward(self, loss: Tensor) -> None:
        """The engine's."""
        super().backward(loss)
        self._zero.exit_backward()  # does nothing after a backward that left as often as it entered


class ZeRO12(FlatBuffers, Spread):
    """Stages 1 and 2."""

    def __init__(self, engine: Any) -> None:
        Spread.__init__(self, engine, _STAGES_1_2)
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


class ZeRO1BF16(FlatBuffers, Spread):
    """Stage 1 in bf16 with gradients accumulated in float32.

    Raises:
        ValueError: gradients are not accumulated at once.
    """

    def __init__(self, engine: Any) -> None:
        Spread.__init__(self, engine, _STAGE_1_BF16_FP32)
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


class ZeRO3(FlatShards, Spread):
    """Stage 3: every parameter is cut into equal runs, and whole only while a module computes."""

    def __init__(self, engine: Any) -> None:
        Spread.__init__(self, engine, _STAGE_3)
        FlatShards.__init__(self)
        offload = self._zero.parameter_offload
        _check_internals(offload, gathered.OFFLOAD)
        _check_internals(offload.param_coordinator, gathered.COORDINATOR)
        _check_internals(self.network, gathered.NETWORK)
        for p in next(iter(self._zero.fp16_groups), [])[:1]:
            _check_internals(p, _STAGE_3_PARAMETER | gathered.PARAMETER)
        self._gathered = gathered.Gathered.of(engine)
        self._kept: set[int] = set()  # by identity, what an ascent has left gathered
        self._place: dict[int, tuple[int, int]] = {}  # of each parameter: its sub-group, and where it starts in it
        for index, group in enumerate(self._zero.fp16_groups):
            start = 0
            for p in group:
                self._place[id(p)] = index, start
                start += p.ds_tensor.numel()

    def groups(self) -> list[list[nn.Parameter]]:
        """The parameters of all sub-groups, by group."""
        groups: list[list[nn.Parameter]] = [[] for _ in self._engine.basic_optimizer.param_groups]
        for index, sub_group in enumerate(self._zero.fp16_groups):
            groups[self._zero.sub_group_to_group_id[index]] += sub_group
        return groups

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """Frees what is left gathered when an exception ends it: the next forward would start from there."""
        try:
            with super().micro_batch(last=last):
                yield
        except BaseException:
            self.forget_copies()
            raise

    def shards(self, parameters: Sequence[nn.Parameter]) -> list[Shard]:
        """The local run of each parameter, flat, without the padding at its end."""
        result = []
        for p in parameters:
            part, numel = p.ds_tensor.detach(), self.whole_shape(p).numel()  # type: ignore[attr-defined]
            start = min(self.shard_index * part.numel(), numel)
            result.append(Shard(part[: min(part.numel(), numel - start)], start, numel))
        return result

    def gradients(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """The local run of each parameter's reduced gradient."""
        lengths = [shard.weight.numel() for shard in self.shards(parameters)]
        return [safe_get_local_grad(p)[:length] for p, length in zip(parameters, lengths, strict=True)]

    def whole_shape(self, parameter: nn.Parameter) -> torch.Size:
        """Its shape when it is gathered."""
        return torch.Size(parameter.ds_shape)  # type: ignore[attr-defined]

    def master(self, parameter: nn.Parameter) -> Master:
        """The run in the copy of its sub-group."""
        index, start = self._place[id(parameter)]
        [shard] = self.shards([parameter])
        stepped = self._zero.fp32_partitioned_groups_flat[index]
        return Master(stepped, start, shard.weight.numel(), self._zero.sub_group_to_group_id[index])

    def clear_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Forget `.grad` and zero the local gradients: a pass overwrites only those that it computes."""
        self._engine.zero_grad()  # on the CPU the optimizer's own stumbles over a `.grad` that an exception left
        self._zero.zero_grad()
        self._zero.grad_partitions_flat_buffer.zero_()

    def ascent(self, needed: Needed) -> AbstractContextManager[None]:
        """The engine averages gradients in the backward, all that there are. What is to be kept is not freed."""
        self._kept = {id(p) for p in needed.kept}
        return self._gathered.held(needed.kept)

    def publish(self, written: Written | None = None) -> None:
        """Free the gathered copies of what was written to: the next forward gathers what it uses."""
        changed = self.network.parameters() if written is None else written.parameters
        self._gathered.free([p for p in changed if id(p) not in self._kept])

    def forget_copies(self) -> None:
        """Free every gathered copy."""
        self._kept = set()
        self._gathered.free()

    def step(
        self, optimizer: torch.optim.Optimizer, max_grad_norm: float | None, scaler: torch.amp.GradScaler | None
    ) -> None:
        """The engine's, which frees every gathered copy, and if it skips the step gathers none again."""
        super().step(optimizer, max_grad_norm, scaler)
        self._gathered.misses_persistent()

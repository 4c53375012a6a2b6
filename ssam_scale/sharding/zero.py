"""DeepSpeed ZeRO: the engine drives; the step perturbs what the engine's next forward reads.

| stage | spread over the processes | the ascent gradient | what a forward reads |
|---|---|---|---|
| 0 | nothing | `.grad` | the parameters |
| 1, 2 | optimizer state; in 2, gradients | own part of a flat gradient | parameters, which are views of a flat buffer |
| 3 | the weights too | own part of each parameter's | whole parameters, gathered from the parts |

Stages 1 to 3 keep the weights that the optimizer steps apart from those that the forward uses. Only the latter are
perturbed, and put back by copy: the optimizer never sees w + ε.

DeepSpeed has no public calls for most of this. What is used of its internals is named in `_INTERNALS` and the like of
`zero3`, with the reason, and looked for when a backend is constructed: another DeepSpeed fails there and not in the
middle of training.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.utils import all_gather_dp_groups
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from .base import Shard, Sharding, Unsharded, all_gather_samples

VERSIONS = ((0, 19, 8), (0, 20, 0))  # from, up to but without

# Attributes of DeepSpeedZeroOptimizer (stages 1 and 2), and why each.
_INTERNALS = {
    "bit16_groups": "which parameters are trained, by group; the optimizer's own groups hold flat shards instead",
    "bit16_groups_flat": "the flat buffers that the parameters are views of: a parameter's place is its address in one",
    "parallel_partitioned_bit16_groups": "the parts of the flat buffers: this process perturbs its own",
    "averaged_gradients": "this process's part of the reduced gradient; safe_get_full_grad would gather all of it",
    "all_grad_tensors": "accumulates over backwards; without dropping it the descent gradient adds to the ascent's",
    "real_dp_process_group": "publishing: argument of all_gather_dp_groups, as the optimizer's own step calls it",
    "nccl_start_alignment_factor": "publishing: argument of all_gather_dp_groups",
    "allgather_bucket_size": "publishing: argument of all_gather_dp_groups",
    "exit_backward": "a backward through a shared prefix enters two engine outputs but leaves one",
}


def zero_sharding(engine: Any) -> Sharding:
    """The backend of a DeepSpeed engine.

    Args:
        engine: what `deepspeed.initialize` returned, ZeRO stage 0 to 3, with an optimizer.

    Raises:
        ValueError: the engine is set up in a way that is not supported; names the setting.
        RuntimeError: this DeepSpeed is not one whose internals are known.
    """
    _check_setup(engine)
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return ZeRO0(engine)
    if stage == 3:
        from .zero3 import ZeRO3

        return ZeRO3(engine)
    return ZeRO12(engine)


def check_internals(optimizer: Any, internals: Mapping[str, str]) -> None:
    """Fail, once and with a list, where DeepSpeed is not the one that this file was written for."""
    known, version = VERSIONS, deepspeed.__version__
    numbers = (deepspeed.__version_major__, deepspeed.__version_minor__, deepspeed.__version_patch__)
    missing = [name for name in internals if not hasattr(optimizer, name)]
    if missing or not known[0] <= numbers < known[1]:
        low, high = (".".join(map(str, bound)) for bound in known)
        what = f"; {type(optimizer).__name__} lacks {', '.join(missing)}" if missing else ""
        raise RuntimeError(f"DeepSpeed {version} is not supported: at least {low} and below {high} is needed{what}")


def _check_setup(engine: Any) -> None:
    def on(offload: Any) -> bool:
        return offload is not None and offload.device != "none"

    wrapped = engine.optimizer is not engine.basic_optimizer
    refused = {
        "an engine without an optimizer": engine.basic_optimizer is None,
        "a pipeline engine": isinstance(engine, deepspeed.PipelineEngine),
        "model, tensor, sequence or expert parallelism": engine.seq_dp_world_size != dist.get_world_size()
        or engine.dp_world_size != dist.get_world_size()
        or engine.has_moe_layers,
        "fp16 (bf16 has the same size and needs no loss scaling)": engine.fp16_enabled(),
        "bf16 with ZeRO stage 0, or stage 1 with fp32 gradient accumulation": engine.bfloat16_enabled()
        and (not wrapped or type(engine.optimizer).__name__ == "BF16_Optimizer"),
        "managed_gradient_accumulation: false": not engine.managed_gradient_accumulation(),
        "zero_optimization.offload_optimizer": on(engine.zero_offload_optimizer()),
        "zero_optimization.offload_param": on(engine.zero_offload_param()),
        "zero_optimization.zero_hpz_partition_size above 1": engine.zero_hpz_partition_size() > 1,
        "zero_optimization.zero_quantized_weights": engine.zero_quantized_weights(),
        "zero_optimization.zero_quantized_gradients": engine.zero_quantized_gradients(),
        "zero_optimization.zenflow": engine.zenflow_config() is not None,
        "compile.deepcompile": engine.is_deepcompile_enabled(),
        # Its timers may be started once a backward, and a backward through a shared prefix starts them twice.
        "wall_clock_breakdown": engine.wall_clock_breakdown(),
    }
    if reasons := [name for name, found in refused.items() if found]:
        raise ValueError(f"SparseSAM on a DeepSpeed engine does not support {'; '.join(reasons)}")


def zero_engine(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    stage: int,
    *,
    batch_size: int,
    accumulation: int = 1,
    max_grad_norm: float | None = None,
    config: Mapping[str, Any] | None = None,
) -> nn.Module:
    """`deepspeed.initialize` with the settings that follow from how SparseSAM trains.

    Args:
        module: the model, on its device.
        optimizer: over its parameters.
        stage: of ZeRO, 0 to 3.
        batch_size: samples of one micro-batch on one process.
        accumulation: micro-batches in one step.
        max_grad_norm: the descent gradient is clipped to this norm.
        config: further sections of DeepSpeed's configuration.
    """
    settings = {
        # One line every ten steps otherwise.
        "steps_per_print": sys.maxsize,
        **(config or {}),
        "train_micro_batch_size_per_gpu": batch_size,
        "gradient_accumulation_steps": accumulation,
        # Left out it is 1.0 since 0.19.3, which clips.
        "gradient_clipping": max_grad_norm or 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {**(config or {}).get("zero_optimization", {}), "stage": stage},
    }
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
    assert isinstance(engine, nn.Module)
    return engine


class Driven:
    """What all stages have in common: forward, backward and step are the engine's."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.network: nn.Module = engine.module
        self.ascent_module: nn.Module = engine
        self.descent_module: nn.Module = engine

    def trained(
        self, optimizer: torch.optim.Optimizer, max_grad_norm: float | None
    ) -> tuple[torch.optim.Optimizer, list[nn.Parameter]]:
        """The optimizer that the engine steps, and the model's parameters that it was given."""
        engine = self._engine
        if optimizer is not engine.optimizer and optimizer is not engine.basic_optimizer:
            raise ValueError("the optimizer is not the one that the DeepSpeed engine was initialised with")
        clipping = engine.gradient_clipping()
        if max_grad_norm is not None and max_grad_norm != clipping:
            raise ValueError(
                f"max_grad_norm is {max_grad_norm} but the DeepSpeed engine clips, with gradient_clipping {clipping}; "
                "set it in the DeepSpeed configuration (0.0 is off; left out it is 1.0) and leave max_grad_norm at None"
            )
        return engine.basic_optimizer, self._parameters()

    def _parameters(self) -> list[nn.Parameter]:
        groups = self._engine.basic_optimizer.param_groups
        return [p for group in groups for p in group["params"] if p.requires_grad]

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """The engine is told where accumulation ends, instead of counting calls of `step`."""
        self._engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        """The engine's; the loss is already divided by the number of micro-batches."""
        self._engine.backward(loss, scale_wrt_gas=False)

    def reduce_ascent(self, parameters: Sequence[nn.Parameter]) -> None:
        """The engine reduced them in the backward."""

    def step(self, optimizer: torch.optim.Optimizer, max_grad_norm: float | None) -> None:
        """The engine's step: it clips, steps the optimizer, and gathers the weights."""
        self._engine.step()

    def gather_samples(self, samples: Tensor) -> Tensor:
        """An all-gather over all processes."""
        assert dist.group.WORLD is not None
        return all_gather_samples(samples, dist.group.WORLD)


class ZeRO0(Driven, Unsharded):
    """Stage 0: every process holds everything, in the places where autograd has it."""

    def clear_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Drop `.grad`."""
        self._engine.zero_grad()


class Spread(Driven):
    """What stages 1 to 3 have in common: a shard is one run of elements of a row-major parameter."""

    def __init__(self, engine: Any, internals: Mapping[str, str]) -> None:
        super().__init__(engine)
        self._zero = engine.optimizer
        check_internals(self._zero, internals)
        self.shards_each, self.shard_index = dist.get_world_size(), dist.get_rank()

    def shards(self, parameters: Sequence[nn.Parameter]) -> list[Shard]:
        """The local run of each parameter, flat."""
        raise NotImplementedError

    def backward(self, loss: Tensor) -> None:
        """The engine's."""
        super().backward(loss)
        self._zero.exit_backward()  # does nothing after a backward that left as often as it entered

    def sum_over_shards(self, value: Tensor) -> Tensor:
        """An all-reduce over all processes."""
        dist.all_reduce(value)
        return value

    def gather(self, parameter: nn.Parameter, local: Tensor) -> Tensor:
        """An all-reduce of the whole, which is zero outside of the local run."""
        [shard] = self.shards([parameter])
        dtype = torch.uint8 if local.dtype == torch.bool else local.dtype
        whole = torch.zeros(shard.numel, dtype=dtype, device=local.device)
        whole[shard.start : shard.start + local.numel()] = local.to(dtype)
        dist.all_reduce(whole)
        return whole.to(local.dtype).reshape(self._shape(parameter))

    def scatter(self, parameter: nn.Parameter, whole: Tensor) -> Tensor:
        """The local run."""
        [shard] = self.shards([parameter])
        return whole.reshape(-1)[shard.start : shard.start + shard.weight.numel()]

    def _shape(self, parameter: nn.Parameter) -> torch.Size:
        return parameter.shape


class ZeRO12(Spread):
    """Stages 1 and 2: the parameters of a group are views of one flat buffer, of which each process steps one part."""

    def __init__(self, engine: Any) -> None:
        if type(engine.optimizer) is not DeepSpeedZeroOptimizer:
            raise ValueError(f"ZeRO stages 1 and 2 with a {type(engine.optimizer).__name__} are not supported")
        super().__init__(engine, _INTERNALS)

    def _parameters(self) -> list[nn.Parameter]:
        if len(self._zero.bit16_groups) != len(self._engine.basic_optimizer.param_groups):
            raise ValueError("DeepSpeed takes parameter groups only before deepspeed.initialize")
        self._group = {id(p): index for index, group in enumerate(self._zero.bit16_groups) for p in group}
        return [p for group in self._zero.bit16_groups for p in group]

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
        """The local run of each parameter, flat."""
        result = []
        for p in parameters:
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

    def publish(self) -> None:
        """Gather every process's part into the flat buffers, as at the end of the optimizer's step."""
        all_gather_dp_groups(
            groups_flat=self._zero.bit16_groups_flat,
            partitioned_param_groups=self._zero.parallel_partitioned_bit16_groups,
            dp_process_group=self._zero.real_dp_process_group,
            start_alignment_factor=self._zero.nccl_start_alignment_factor,
            allgather_bucket_size=self._zero.allgather_bucket_size,
        )

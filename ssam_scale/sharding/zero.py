"""DeepSpeed ZeRO: the engine drives; the step perturbs what the engine's next forward reads.

| stage | spread over the processes | the ascent gradient | what a forward reads |
|---|---|---|---|
| 0 | nothing | `.grad` | the parameters |
| 1, 2 | optimizer state; in 2, gradients | own part of a flat gradient | parameters, which are views of a flat buffer |
| 3 | the weights too | own part of each parameter's | whole parameters, gathered from the parts |

Stages 1 to 3 keep the weights that the optimizer steps apart from those that the forward uses. Only the latter are
perturbed, and put back by copy: the optimizer never sees w + ε.

DeepSpeed has no public calls for most of this. What is used of its internals is listed on top of `zero12` and `zero3`,
with the reason, and looked for when a backend is constructed: another DeepSpeed fails there and not in the middle of
training.

Stages 1 to 3 hand flat pieces to the optimizer. One that treats every weight alike (SGD, AdamW, Lion) steps as anywhere
else; one that looks at whole tensors (LAMB, LARS, AdamP, Muon) computes something else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from .base import Shard, Sharding, Unsharded, all_gather_samples

VERSIONS = ((0, 19, 8), (0, 20, 0))  # from, up to but without


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
    from .zero12 import ZeRO12

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
    base = getattr(engine.optimizer, "optimizer", None) if wrapped else engine.basic_optimizer
    refused = {
        "an engine without an optimizer": engine.basic_optimizer is None,
        "an optimizer that DeepSpeed replaces by one of its own (Adagrad)": base is not engine.basic_optimizer,
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


class Driven:
    """What all stages have in common: forward, backward and step are the engine's."""

    takes_scaler = False

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.network: nn.Module = engine.module
        self.ascent_module: nn.Module = engine
        self.descent_module: nn.Module = engine

    def trained(
        self, optimizer: torch.optim.Optimizer, max_grad_norm: float | None
    ) -> tuple[torch.optim.Optimizer, list[list[nn.Parameter]]]:
        """The optimizer that the engine steps, and the model's parameters that it was given, by group."""
        engine = self._engine
        if optimizer is not engine.optimizer and optimizer is not engine.basic_optimizer:
            raise ValueError("the optimizer is not the one that the DeepSpeed engine was initialised with")
        clipping = engine.gradient_clipping()
        if max_grad_norm is not None and max_grad_norm != clipping:
            raise ValueError(
                f"max_grad_norm is {max_grad_norm} but the DeepSpeed engine clips, with gradient_clipping {clipping}; "
                "set it in the DeepSpeed configuration (0.0 is off; left out it is 1.0) and leave max_grad_norm at None"
            )
        return engine.basic_optimizer, self._trained_groups()

    def _trained_groups(self) -> list[list[nn.Parameter]]:
        groups = self._engine.basic_optimizer.param_groups
        return [[p for p in group["params"] if p.requires_grad] for group in groups]

    def _parameters(self) -> list[nn.Parameter]:
        return [p for group in self._trained_groups() for p in group]

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

    def step(
        self, optimizer: torch.optim.Optimizer, max_grad_norm: float | None, scaler: torch.amp.GradScaler | None
    ) -> None:
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
        self._groups = len(engine.basic_optimizer.param_groups)

    def trained(
        self, optimizer: torch.optim.Optimizer, max_grad_norm: float | None
    ) -> tuple[torch.optim.Optimizer, list[list[nn.Parameter]]]:
        """The optimizer that the engine steps, and the model's parameters that it was given, by group."""
        if len(self._engine.basic_optimizer.param_groups) != self._groups:
            raise ValueError("DeepSpeed takes parameter groups only before deepspeed.initialize")
        return super().trained(optimizer, max_grad_norm)

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
        return whole.to(local.dtype).reshape(self.whole_shape(parameter))

    def scatter(self, parameter: nn.Parameter, whole: Tensor) -> Tensor:
        """The local run."""
        [shard] = self.shards([parameter])
        return whole.reshape(-1)[shard.start : shard.start + shard.weight.numel()]

    def state_dict(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Refused: the optimizer sees flat pieces."""
        raise RuntimeError(
            "the optimizer's state belongs to the DeepSpeed engine: call engine.save_checkpoint(..., "
            "client_state=opt.sparse_state()), and engine.load_checkpoint with opt.load_sparse_state"
        )

    def load_state_dict(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Refused, as `state_dict`."""
        self.state_dict(optimizer)

    def whole_state(
        self, network: nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Gathers one tensor after the other."""
        named = {id(p): name for name, p in network.named_parameters()}
        stepped = {id(p): self._stepped(p) for p in self._parameters()}
        weights = {}
        for name, t in network.state_dict(keep_vars=True).items():
            if id(t) in stepped:
                pieces, start, length, _ = stepped[id(t)]
                weights[name] = self.gather(t, pieces.detach().narrow(0, start, length)).cpu()
            elif isinstance(t, nn.Parameter):
                weights[name] = self.gather(t, self.shards([t])[0].weight).cpu()
            else:
                weights[name] = t.cpu().clone()
        state: dict[str, dict[str, Any]] = {}
        groups = [{**group, "params": []} for group in optimizer.param_groups]
        for p in self._parameters():
            pieces, start, length, group = stepped[id(p)]
            groups[group]["params"].append(named[id(p)])
            state[named[id(p)]] = {
                # What is shaped like the pieces belongs to single weights, anything else to all of them (a step count).
                entry: self.gather(p, value.narrow(0, start, length)).cpu()
                if isinstance(value, Tensor) and value.shape == pieces.shape
                else value
                for entry, value in optimizer.state.get(pieces, {}).items()
            }
        return weights, {"state": state, "param_groups": groups}

    def load_whole_state(
        self, network: nn.Module, optimizer: torch.optim.Optimizer, weights: dict[str, Any], state: dict[str, Any]
    ) -> None:
        """Writes to what the optimizer steps and to what a forward reads."""
        for name, t in network.state_dict(keep_vars=True).items():
            if isinstance(t, nn.Parameter):
                local = self.shards([t])[0].weight
                local.copy_(self.scatter(t, weights[name]))
            else:
                t.copy_(weights[name])
        named = {id(p): name for name, p in network.named_parameters()}
        for p in self._parameters():
            name, (pieces, start, length, group) = named[id(p)], self._stepped(p)
            with torch.no_grad():
                pieces.narrow(0, start, length).copy_(self.scatter(p, weights[name]))
            for entry, value in state["state"].get(name, {}).items():
                mine = optimizer.state[pieces]
                if isinstance(value, Tensor) and value.shape == self.whole_shape(p):
                    mine.setdefault(entry, torch.zeros_like(pieces, dtype=value.dtype, requires_grad=False))
                    mine[entry].narrow(0, start, length).copy_(self.scatter(p, value))
                else:
                    mine[entry] = value
            saved = next(g for g in state["param_groups"] if name in g["params"])
            optimizer.param_groups[group].update({key: value for key, value in saved.items() if key != "params"})
        self.publish()

    def exposed(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """What changes on this process when the shards of `parameters` are written to and published."""
        raise NotImplementedError

    def publish(self) -> None:
        """Make the next forward on every process use the shards as they are now."""
        raise NotImplementedError

    def forget_copies(self) -> None:
        """Drop copies of weights that were made before the weights changed."""
        raise NotImplementedError

    def whole_shape(self, parameter: nn.Parameter) -> torch.Size:
        """Its shape."""
        return parameter.shape

    def _stepped(self, parameter: nn.Parameter) -> tuple[Tensor, int, int, int]:
        """What the optimizer steps: a flat float32 tensor of pieces of parameters, start and length of the local run
        of this one in it, and the index of its parameter group."""
        raise NotImplementedError

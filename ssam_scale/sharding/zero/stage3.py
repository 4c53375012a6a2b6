"""When ZeRO's stage 3 gathers weights and frees them: by a trace of each kind of pass.

DeepSpeed records in which order a forward and its backward use the modules, and by this trace it gathers weights ahead
and keeps those that it will use again soon. Its coordinator has one trace and throws it away when a pass is another, as
it is in each pass of a step whose ascent starts behind a cut; and while it records, it keeps nothing. Here each kind of
pass has a coordinator with a trace of its own, put in place before the forward. What DeepSpeed does with it, from
recording to throwing away what does not fit, it goes on doing itself.

A prefix whose backward comes after other passes, as that of a shared prefix does, is a pass without a backward to
DeepSpeed, after which nothing is used again soon. Its weights are kept here, if a whole pass would keep them, too.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from deepspeed.utils import safe_get_local_grad
from torch import Tensor, nn

from ssam_scale.sharding.interface import Needed, Shard, Written

from .engine import _BACKWARD, Partitioned, check_internals
from .masters import FlatShards, Master

_STAGE_3 = _BACKWARD | {
    "fp16_groups": "which parameters are trained; the optimizer's own groups are empty between steps",
    "fp32_partitioned_groups_flat": "what the optimizer steps: it keys the optimizer's state, and loading writes it",
    "sub_group_to_group_id": "the parameter group of what the optimizer steps",
    "grad_partitions_flat_buffer": "keeps gradients of earlier passes, which parameters that a pass leaves out show",
    "empty_partition_cache": "frees gathered weights; the engine's method of that name collects garbage each time too",
    "persistent_parameters": "small parameters that DeepSpeed keeps gathered between steps",
    "parameter_offload": "gathers and frees weights; the lists below say what of it is used",
}
_STAGE_3_PARAMETER = {
    "ds_tensor": "the local part, padded to the same length everywhere; public calls reach the float32 master only",
    "ds_shape": "shape of the whole, which also tells weights from padding",
    "ds_numel": "elements of the whole",
}


class ZeRO3(FlatShards, Partitioned):
    """Stage 3: every parameter is cut into equal runs, and whole only while a module computes."""

    def __init__(self, engine: Any) -> None:
        Partitioned.__init__(self, engine, _STAGE_3)
        FlatShards.__init__(self)
        offload = self._zero.parameter_offload
        check_internals(offload, _OFFLOAD)
        check_internals(offload.param_coordinator, _COORDINATOR)
        check_internals(self.network, _NETWORK)
        for p in next(iter(self._zero.fp16_groups), [])[:1]:
            check_internals(p, _STAGE_3_PARAMETER | _PARAMETER)
        self._gathered = Gathered.of(engine)
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


# Internals of DeepSpeed that are used here, with the reason.
_OFFLOAD = {"param_coordinator": "gathers and frees weights around modules; its hooks ask for it each time"}
_COORDINATOR = {
    "is_invalid_trace": "whether a trace was thrown away: what is remembered of when to free weights is of the old one",
    "_invalidate_trace": "a coordinator that has been at work is no beginning for others",
    "_clear_trace_structures": "copies of a coordinator must not record into the same list",
}
_NETWORK = {"ds_inflight_param_registry": "weights that are being gathered must have come before they are freed"}
_PARAMETER = {
    "ds_active_sub_modules": "a parameter is not freed while there is one",
    "partition": "frees one parameter; empty_partition_cache frees all",
    "all_gather": "gathers the persistent parameters together, as at the end of the optimizer's step",
}

# Of a cut there are three: prefix, ascent and descent. A mask that leaves tensors out has others after each refresh.
# Each takes 0.2 MB of the host's memory where there are 12 blocks.
_MOST_KINDS = 256

_HELD = -1  # stands for a module that uses a parameter; no module has this number


class Gathered:
    """The gathered weights of a stage 3 engine.

    Args:
        engine: that DeepSpeed returned; `Gathered.of` gives each the one that it has.

    Attributes:
        coordinators: by kind of pass, the one of the latest pass last.
    """

    def __init__(self, engine: Any) -> None:
        self._network: nn.Module = engine.module
        self._parameters: list[Any] = list(self._network.parameters())
        self._zero, self._offload = engine.optimizer, engine.optimizer.parameter_offload
        self._blank = copy.copy(self._offload.param_coordinator)
        if not self._blank.is_invalid_trace():
            self._blank._invalidate_trace()
        # A whole forward and backward keep what they gather up to here.
        self._keeps = 2 * sum(p.ds_numel for p in self._parameters) <= engine.zero_max_reuse_distance()
        self._misses_persistent = False
        self._inside = ExitStack()
        self.coordinators: OrderedDict[Hashable, Any] = OrderedDict()
        # Before DeepSpeed's own, which asks the coordinator to begin a pass.
        self._network.register_forward_pre_hook(self._begin, prepend=True, with_kwargs=True)
        self._network.register_forward_hook(self._end, always_call=True)

    @classmethod
    def of(cls, engine: Any) -> Gathered:
        """The engine's."""
        offload = engine.optimizer.parameter_offload
        if not isinstance(getattr(offload, "ssam_gathered", None), cls):
            offload.ssam_gathered = cls(engine)
        found: Gathered = offload.ssam_gathered
        return found

    def free(self, parameters: Sequence[Any] | None = None) -> None:
        """Free the gathered copies of `parameters`, those that DeepSpeed keeps too; None: of all."""
        if parameters is None:
            self._zero.empty_partition_cache()
        else:
            inflight: Any = self._network.ds_inflight_param_registry
            for p in parameters:
                if p in inflight:
                    inflight.pop(p).wait()
                p.ds_active_sub_modules.clear()
                p.partition()
        self.misses_persistent()

    def misses_persistent(self) -> None:
        """Gather what DeepSpeed keeps before the next forward, and not now, when other processes may have failed.

        A forward that finds such a parameter missing gathers it, too, but where it is used outside of its own module,
        as a `StagedModel` does, that adds it to a module whose use of parameters has been recorded: a tracing error.
        """
        self._misses_persistent = True

    @contextmanager
    def held(self, parameters: Iterable[Any]) -> Iterator[None]:
        """Modules inside do not free `parameters` when they are done with them."""
        held = [p for p in parameters if _HELD not in p.ds_active_sub_modules]
        for p in held:
            p.ds_active_sub_modules.add(_HELD)
        try:
            yield
        finally:
            for p in held:
                p.ds_active_sub_modules.discard(_HELD)

    def _begin(self, network: nn.Module, inputs: Sequence[Any], options: Mapping[str, Any]) -> None:
        if self._misses_persistent:
            self._misses_persistent = False
            if kept := self._zero.persistent_parameters:
                kept[0].all_gather(kept)  # those that are missing
        self._offload.param_coordinator = self._coordinator(self._kind(inputs, options))
        if self._keeps and options.get("stop") is not None and torch.is_grad_enabled():
            self._inside.enter_context(self.held(self._parameters))

    def _end(self, network: nn.Module, inputs: Any, output: Any) -> None:
        self._inside.close()

    def _kind(self, inputs: Sequence[Any], options: Mapping[str, Any]) -> Hashable:
        """What decides in which order a forward and the backward after it use modules."""
        part = [options.get(end) for end in ("start", "stop")]  # of a `StagedModel`
        return (
            torch.is_grad_enabled(),
            self._network.training,
            tuple(index if isinstance(index, int) else None for index in part),
            tuple(x.requires_grad for x in inputs if isinstance(x, Tensor)),
            tuple(p.requires_grad for p in self._parameters),
        )

    def _coordinator(self, kind: Hashable) -> Any:
        found = self.coordinators.pop(kind, None)
        if found is None or found.is_invalid_trace():
            found = copy.copy(self._blank)
            found._clear_trace_structures()
        self.coordinators[kind] = found
        if len(self.coordinators) > _MOST_KINDS:
            _, oldest = self.coordinators.popitem(last=False)
            oldest._clear_trace_structures()  # DeepSpeed never lets go of a coordinator that has freed weights
        return found

"""ZeRO stage 3: every parameter is sharded over all ranks, and gathered only while a module computes.

How it is perturbed, in the order of a step:

- Ascent: forward and backward are the engine's. It gathers each module's parameters, frees them and reduce-scatters
  the gradients, of which a collective of ours sends what is perturbed. What the mask leaves alone can stay gathered for
  the descent (`ascent`).
- Ascent gradient: this rank's run of each parameter's, which `safe_get_local_grad` shows (`gradients`).
- Perturbation: written to `ds_tensor`, this rank's run of the weights, without the padding at its end (`shards`). The
  optimizer steps float32 masters and never sees it.
- Publishing: nothing is sent. Gathered copies of what was written to are freed, so that the next forward gathers the
  perturbed weights (`publish`). Restoring copies the runs back and frees the copies again (`reshard`), also on one rank
  alone.
- Cleared between the passes: `.grad` and the flat buffer of the reduced gradients, in which parameters that a pass
  leaves out would still show those of an earlier one (`clear_gradients`).

The second half of the file, `GatheredParameters`, decides what is freed when, and keeps DeepSpeed's trace of each kind
of pass, so that ascents behind a cut are not recorded anew in each step.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.runtime.zero import stage3
from deepspeed.utils import safe_get_local_grad
from torch import Tensor, nn

from ssam_scale.sharding.interface import AscentReduction, Shard, WrittenWeights
from ssam_scale.sharding.packed_reduce_scatter import Asked, Packings
from ssam_scale.torch_compat import reduce_scatter_single

from .engine import BACKWARD_INTERNALS, ZeROTraining, check_internals
from .masters import FlatShards, Master, MasterState

_OPTIMIZER_INTERNALS = BACKWARD_INTERNALS | {
    "fp16_groups": "which parameters are trained; the optimizer's own groups are empty between steps",
    "fp32_partitioned_groups_flat": "the masters: they key the optimizer's state, and loading writes them",
    "sub_group_to_group_id": "the parameter group of a master",
    "grad_partitions_flat_buffer": "keeps gradients of earlier passes, which parameters that a pass leaves out show",
    "empty_partition_cache": "frees gathered weights; the engine's method of that name collects garbage each time too",
    "persistent_parameters": "small parameters that DeepSpeed keeps gathered between steps",
    "parameter_offload": "gathers and frees weights; the lists below say what of it is used",
    "reduce_scatter": "whether gradients come by the two functions below",
    "_DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads": "knows the parameters of the gradients that are scattered",
}
_MODULE_INTERNALS = {"reduce_scatter_coalesced": "scatters whole gradients, where we scatter what is perturbed"}
_PARAMETER_INTERNALS = {
    "ds_tensor": "this rank's run, padded to the same length on each; public calls reach the float32 master only",
    "ds_shape": "the full shape, which also tells weights from padding",
    "ds_numel": "elements of the full parameter",
    "ds_active_sub_modules": "a parameter is not freed while there is one",
    "partition": "frees one parameter; empty_partition_cache frees all",
    "ds_status": "which persistent parameters are missing",
    "all_gather_coalesced": "gathers them together; `all_gather` would make the host wait for the device",
}
_OFFLOAD_INTERNALS = {
    "param_coordinator": "gathers and frees weights around modules; its hooks ask for it each time",
    "_DeepSpeedZeRoOffload__allgather_stream": "it does not wait for the stream on which the step writes weights",
}
_COORDINATOR_INTERNALS = {
    "is_invalid_trace": "whether a trace was thrown away: what is remembered of when to free weights is of the old one",
    "_invalidate_trace": "a coordinator that has been at work is no beginning for others",
    "_clear_trace_structures": "copies of a coordinator must not record into the same list",
}
_reduce_scatter_coalesced = stage3.reduce_scatter_coalesced
_NETWORK_INTERNALS = {
    "ds_inflight_param_registry": "weights that are being gathered must have come before they are freed"
}


class ZeRO3(FlatShards, MasterState, ZeROTraining):
    """Stage 3: every parameter is cut into equal runs, one a rank, the last ones padded."""

    def __init__(self, engine: Any) -> None:
        ZeROTraining.__init__(self, engine, _OPTIMIZER_INTERNALS)
        FlatShards.__init__(self)
        offload = self._zero.parameter_offload
        check_internals(offload, _OFFLOAD_INTERNALS)
        check_internals(offload.param_coordinator, _COORDINATOR_INTERNALS)
        check_internals(self.network, _NETWORK_INTERNALS)
        check_internals(stage3, _MODULE_INTERNALS)
        for p in next(iter(self._zero.fp16_groups), [])[:1]:
            check_internals(p, _PARAMETER_INTERNALS)
        self._gathered = GatheredParameters.of(engine)
        self.packs_gradients = self._zero.reduce_scatter and self.shard_group.size > 1
        self.packings = Packings(self.shard_group.size, self.shard_group.rank)
        self._kept_gathered: set[int] = set()  # by identity, what an ascent has left gathered
        self._place: dict[int, tuple[int, int]] = {}  # of each parameter: its sub-group, and where it starts in it
        for index, sub_group in enumerate(self._zero.fp16_groups):
            start = 0
            for p in sub_group:
                self._place[id(p)] = index, start
                start += p.ds_tensor.numel()

    @contextmanager
    def ascent(self, reduction: AscentReduction) -> Iterator[None]:
        """The engine averages in the backward what is asked for of the gradients. What is to be kept is not freed."""
        self._kept_gathered = {id(p) for p in reduction.keep_gathered}
        scatter = partial(_scatter, self.packings, Asked(reduction))
        packing = _scattering(self._zero, scatter) if self.packs_gradients else nullcontext()
        with self._gathered.held(reduction.keep_gathered), packing:
            yield

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """Frees what is left gathered when an exception ends it: the next forward would start from there."""
        try:
            with super().micro_batch(last=last):
                yield
        except BaseException:
            self.reshard()
            raise

    def gradients(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """This rank's run of each parameter's reduced gradient, without the padding."""
        lengths = [shard.weight.numel() for shard in self.shards(parameters)]
        return [safe_get_local_grad(p)[:length] for p, length in zip(parameters, lengths, strict=True)]

    def resident_gradients(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """The same."""
        return self.gradients(parameters)

    def shards(self, parameters: Sequence[nn.Parameter]) -> list[Shard]:
        """This rank's run of each parameter, flat, without the padding."""
        result = []
        for p in parameters:
            run, numel = p.ds_tensor.detach(), self.full_shape(p).numel()  # type: ignore[attr-defined]
            start = min(self.shard_group.rank * run.numel(), numel)
            result.append(Shard(run[: min(run.numel(), numel - start)], start, numel))
        return result

    def clear_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Drop `.grad` and zero the reduced gradients: a pass overwrites only those that it computes."""
        self._engine.zero_grad()  # on the CPU the optimizer's own stumbles over a `.grad` that an exception left
        self._zero.zero_grad()
        self._zero.grad_partitions_flat_buffer.zero_()

    def publish(self, written: WrittenWeights | None = None) -> None:
        """Free the gathered copies of what was written to: the next forward gathers what it uses."""
        changed = self.network.parameters() if written is None else written.parameters
        self._gathered.free([p for p in changed if id(p) not in self._kept_gathered])

    def reshard(self) -> None:
        """Free every gathered copy."""
        self._kept_gathered = set()
        self._gathered.free()

    def step(
        self, optimizer: torch.optim.Optimizer, max_grad_norm: float | None, scaler: torch.amp.GradScaler | None
    ) -> None:
        """The engine's, which frees every gathered copy, and if it skips the step gathers none again."""
        super().step(optimizer, max_grad_norm, scaler)
        self._gathered.regather_persistent()

    def full_shape(self, parameter: nn.Parameter) -> torch.Size:
        """Its shape when it is gathered."""
        return torch.Size(parameter.ds_shape)  # type: ignore[attr-defined]

    def groups(self) -> list[list[nn.Parameter]]:
        """The parameters of all sub-groups, by parameter group."""
        groups: list[list[nn.Parameter]] = [[] for _ in self._engine.basic_optimizer.param_groups]
        for index, sub_group in enumerate(self._zero.fp16_groups):
            groups[self._zero.sub_group_to_group_id[index]] += sub_group
        return groups

    def master(self, parameter: nn.Parameter) -> Master:
        """The run in the master of its sub-group."""
        index, start = self._place[id(parameter)]
        [shard] = self.shards([parameter])
        master = self._zero.fp32_partitioned_groups_flat[index]
        return Master(master, start, shard.weight.numel(), self._zero.sub_group_to_group_id[index])


Scatter: TypeAlias = Callable[[Sequence[nn.Parameter], list[Tensor], Any], list[Tensor]]
"""As DeepSpeed's `reduce_scatter_coalesced`, which is not told the parameters of the gradients."""


@contextmanager
def _scattering(zero: Any, scatter: Scatter) -> Iterator[None]:
    """Backwards inside scatter gradients by `scatter`; all that DeepSpeed does before and after, it does as always."""
    averaged = zero._DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads

    def of_known_parameters(parameters: Sequence[nn.Parameter], dtype: torch.dtype) -> Any:
        stage3.reduce_scatter_coalesced = partial(scatter, list(parameters))
        try:
            return averaged(parameters, dtype)
        finally:
            stage3.reduce_scatter_coalesced = _reduce_scatter_coalesced

    zero._DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads = of_known_parameters
    try:
        yield
    finally:
        del zero._DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads  # the class's own shows again


def _scatter(
    packings: Packings,
    asked: Asked,
    parameters: Sequence[nn.Parameter],
    gradients: Sequence[Tensor],
    group: dist.ProcessGroup | None = None,
) -> list[Tensor]:
    """This rank's runs of the averages of whole gradients, without padding; zero where nothing was asked for."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    places = [asked.of(p, g.numel(), -(-g.numel() // size)) for p, g in zip(parameters, gradients, strict=True)]
    output = gradients[0].new_zeros(sum(place.padded for place in places if place.asked))
    needed = [(place, g) for place, g in zip(places, gradients, strict=True) if place.asked]
    packing = packings(tuple(map(id, parameters)), [place for place, _ in needed])
    if packing is None and len(needed) == len(places):
        return list(_reduce_scatter_coalesced(gradients, group))
    if needed:
        padded = [F.pad(g.reshape(-1), (0, size * place.padded - place.numel)) for place, g in needed]
        buffer = torch.cat([g.view(size, -1) for g in padded], dim=1).view(-1)
        del padded

        def reduce(received: Tensor, sent: Tensor) -> None:
            reduce_scatter_single(received, sent.div_(size), dist.ReduceOp.SUM, group)

        if packing is None:
            reduce(output, buffer)
        else:
            packing.reduce_scatter(output, buffer, reduce, group)
    result, offset = [], 0
    for place in places:
        length = max(0, min(place.padded, place.numel - rank * place.padded))
        if place.asked:
            result.append(output[offset : offset + length])
            offset += place.padded
        else:
            result.append(output.new_zeros(length))
    return result


# Of a cut there are three: prefix, ascent and descent. A mask that leaves tensors out has others after each refresh.
# Each takes 0.2 MB of the host's memory where there are 12 blocks.
_MAX_TRACES = 256

_HELD = -1  # stands for a submodule that uses a parameter; none has this number


class GatheredParameters:
    """When the parameters of an engine are gathered and freed, with one of DeepSpeed's traces for each kind of pass.

    DeepSpeed's coordinator records in which order a forward and its backward use the modules, and by this trace it
    gathers weights ahead and keeps those that it will use again soon. It has one trace and throws it away when a pass
    is another, as it is in each pass of a step whose ascent starts behind a cut; and while it records, it keeps
    nothing. Here each kind of pass has a coordinator with a trace of its own, put in place before the forward. What
    DeepSpeed does with it, from recording to throwing away what does not fit, it goes on doing itself.

    A prefix whose backward comes after other passes, as that of a shared prefix does, is a pass without a backward to
    DeepSpeed, after which nothing is used again soon. Its weights are kept here, if a whole pass would keep them, too.

    Args:
        engine: that DeepSpeed returned; `GatheredParameters.of` gives each the one that it has.
    """

    def __init__(self, engine: Any) -> None:
        self._network: nn.Module = engine.module
        self._parameters: list[Any] = list(self._network.parameters())
        self._zero, self._offload = engine.optimizer, engine.optimizer.parameter_offload
        self._blank = copy.copy(self._offload.param_coordinator)
        if not self._blank.is_invalid_trace():
            self._blank._invalidate_trace()
        # Whether a whole forward and backward keep what they gather.
        self._keeps = 2 * sum(p.ds_numel for p in self._parameters) <= engine.zero_max_reuse_distance()
        self._persistent_freed = False
        self._prefix_held = ExitStack()
        self._coordinators: OrderedDict[Hashable, Any] = OrderedDict()  # by kind of pass, the latest last
        # Before DeepSpeed's own hook, which asks the coordinator to begin a pass.
        self._network.register_forward_pre_hook(self._before_forward, prepend=True, with_kwargs=True)
        self._network.register_forward_hook(self._after_forward, always_call=True)

    @classmethod
    def of(cls, engine: Any) -> GatheredParameters:
        """The engine's."""
        offload = engine.optimizer.parameter_offload
        if not isinstance(getattr(offload, "ssam_gathered", None), cls):
            offload.ssam_gathered = cls(engine)
        found: GatheredParameters = offload.ssam_gathered
        return found

    def free(self, parameters: Sequence[Any] | None = None) -> None:
        """Free the gathered copies of `parameters`, persistent ones too; None: of all. Not collective."""
        if parameters is None:
            self._zero.empty_partition_cache()
        else:
            inflight: Any = self._network.ds_inflight_param_registry
            for p in parameters:
                if p in inflight:
                    inflight.pop(p).wait()
                p.ds_active_sub_modules.clear()
                p.partition()
        self.regather_persistent()

    def regather_persistent(self) -> None:
        """Gather the persistent parameters before the next forward, and not now, when other ranks may have failed.

        A forward that finds such a parameter missing gathers it, too, but where it is used outside of its own module,
        as a `StagedModel` does, that adds it to a module whose use of parameters has been recorded: a tracing error.
        """
        self._persistent_freed = True

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

    def _before_forward(self, network: nn.Module, inputs: Sequence[Any], options: Mapping[str, Any]) -> None:
        # What this pass gathers is what was written before it: w + ε, w again, a checkpoint's or averaged weights.
        if (gathers := self._offload._DeepSpeedZeRoOffload__allgather_stream) is not None:
            gathers.wait_stream(torch.get_device_module(gathers.device).current_stream())
        if self._persistent_freed:
            self._persistent_freed = False
            if missing := [p for p in self._zero.persistent_parameters if p.ds_status.name == "NOT_AVAILABLE"]:
                missing[0].all_gather_coalesced(missing).wait()
        self._offload.param_coordinator = self._coordinator(self._kind(inputs, options))
        if self._keeps and options.get("stop") is not None and torch.is_grad_enabled():
            self._prefix_held.enter_context(self.held(self._parameters))

    def _after_forward(self, network: nn.Module, inputs: Any, output: Any) -> None:
        self._prefix_held.close()

    def _kind(self, inputs: Sequence[Any], options: Mapping[str, Any]) -> Hashable:
        """What decides in which order a forward and the backward after it use modules."""
        stages = [options.get(end) for end in ("start", "stop")]  # of a `StagedModel`
        return (
            torch.is_grad_enabled(),
            self._network.training,
            tuple(index if isinstance(index, int) else None for index in stages),
            tuple(x.requires_grad for x in inputs if isinstance(x, Tensor)),
            tuple(p.requires_grad for p in self._parameters),
        )

    def _coordinator(self, kind: Hashable) -> Any:
        found = self._coordinators.pop(kind, None)
        if found is None or found.is_invalid_trace():
            found = copy.copy(self._blank)
            found._clear_trace_structures()
        self._coordinators[kind] = found
        if len(self._coordinators) > _MAX_TRACES:
            _, oldest = self._coordinators.popitem(last=False)
            oldest._clear_trace_structures()  # DeepSpeed never lets go of a coordinator that has freed weights
        return found

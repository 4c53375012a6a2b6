"""The one place that knows of versions of PyTorch: refuses what is too old, and has the names that came late.

Importing it is the check. The packages that compute import it first, so that an old torch is told in one line, and not
by whatever it lacks first. A torch newer than any that is named here is used as the newest of them.
"""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ssam_scale.errors import UnsupportedVersionError

# FSDP2's parts that are used here (a reduce-scatter of one's own, its groups of parameters) are there from it on.
OLDEST = (2, 10)


def check_torch(version: str) -> None:
    """Refuse a torch that is too old.

    Args:
        version: of it. Builds of vendors call a release by what it is going to be (2.10.0a0+b4e4ee8).

    Raises:
        UnsupportedVersionError: it is older than `OLDEST`.
    """
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is not None and (int(numbers[1]), int(numbers[2])) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise UnsupportedVersionError(
            f"torch {version} is too old: ssam_scale needs {oldest} or newer; pip install 'torch>={oldest}' torchvision"
        )


check_torch(torch.__version__)

# Beyond this line nothing asks for a version: a name is there or it is not.


@contextmanager
def new_groups_wait(timeout: timedelta) -> Iterator[None]:
    """Within the `with`, process groups that say nothing of it have this time limit, also those of other packages.

    `new_group` and `init_device_mesh` take a constant of torch's, and not what the default group was given.
    """
    module, names = dist.distributed_c10d, ("default_pg_timeout", "default_pg_nccl_timeout")
    kept = {name: getattr(module, name) for name in names}
    try:
        for name in names:
            setattr(module, name, timeout)
        yield
    finally:
        for name, value in kept.items():
            setattr(module, name, value)


def keep_flight_records(prefix: Path) -> None:
    """Have PyTorch remember the last collectives, before a process group is made; what the environment says stays.

    Args:
        prefix: of the files that NCCL's watchdog leaves when a collective has waited too long; a rank follows.
    """
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(prefix))


def flight_record() -> bytes | None:
    """The last collectives of this process, for `torch.distributed.flight_recorder.fr_trace`; None: not recorded."""
    names = ("_dump_nccl_trace", "_dump_fr_trace")
    found = (getattr(torch._C._distributed_c10d, name, None) for name in names)
    dump = next((function for function in found if function is not None), None)
    return bytes(dump()) if dump is not None and int(os.environ.get("TORCH_FR_BUFFER_SIZE", "0")) > 0 else None


def foreach_clone(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Copies of tensors of one dtype, in few launches, for which torch 2.13 has a function.

    Args:
        tensors: any; their layouts stay.
    """
    if clone := getattr(torch, "_foreach_clone", None):
        cloned: list[torch.Tensor] = clone(tensors)
        return cloned
    copies = [torch.empty_like(t) for t in tensors]
    torch._foreach_copy_(copies, tensors)
    return copies


def all_gather_single(output: torch.Tensor, own: torch.Tensor, group: dist.ProcessGroup | None = None) -> None:
    """`own` of every rank one after the other in `output`; collective. Called so from torch 2.13 on.

    Args:
        output: of shape (ranks · elements,).
        own: of shape (elements,).
        group: the ranks; None: all.
    """
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(output, own, group=group)


def reduce_scatter_single(output: torch.Tensor, parts: torch.Tensor, op: Any, group: dist.ProcessGroup | None) -> None:
    """This rank's part of the reduced `parts` in `output`; collective. Called so from torch 2.13 on.

    Args:
        output: of shape (elements,).
        parts: of shape (ranks · elements,).
        op: how they are reduced.
        group: the ranks; None: all.
    """
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    scatter(output, parts, op=op, group=group)


def _buffers_argument() -> str:
    renamed = "forward_sync_buffers" in inspect.signature(torch.nn.parallel.DistributedDataParallel).parameters
    return "forward_sync_buffers" if renamed else "broadcast_buffers"


FORWARD_SYNC_BUFFERS = _buffers_argument()
"""DDP's argument for broadcasting buffers in each forward: `forward_sync_buffers` from torch 2.13 on."""


def broadcasts_buffers(module: torch.nn.parallel.DistributedDataParallel) -> bool:
    """Whether DDP does so."""
    return bool(getattr(module, FORWARD_SYNC_BUFFERS))


def allow_graphs(of_a_code: int) -> None:
    """Let `torch.compile` make at least so many graphs of one code in this process; beyond that it compiles nothing."""
    from torch._dynamo import config  # takes a second to import

    config.recompile_limit = max(config.recompile_limit, of_a_code)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, of_a_code)


def compile_module(module: torch.nn.Module, options: dict[str, Any]) -> None:
    """`module.compile(**options)`, also of torch's own modules (`nn.Sequential`), of which that compiles nothing.

    Dynamo leaves code of torch's own alone where a call begins in it; this one begins here.
    """
    if not type(module).__module__.startswith("torch.nn."):
        module.compile(**options)
        return

    def call(*args: Any, **kwargs: Any) -> Any:
        return module._call_impl(*args, **kwargs)

    module._compiled_call_impl = torch.compile(call, **options)


def is_compiled(module: torch.nn.Module) -> bool:
    """Whether it is what `torch.compile` returned: a module around the model, which gives parameters other names."""
    dynamo = sys.modules.get("torch._dynamo")
    return dynamo is not None and isinstance(module, dynamo.OptimizedModule)


FUSED_STEPS = {torch.optim.SGD: "_fused_sgd_", torch.optim.Adam: "_fused_adam_", torch.optim.AdamW: "_fused_adamw_"}
"""The operator that each optimizer of torch's with fused kernels steps by."""


def fuses(optimizer: Any, parameter: torch.Tensor) -> bool:
    """Whether torch has fused kernels of an optimizer for a parameter.

    Args:
        optimizer: its class; subclasses of torch's own step in their own way.
        parameter: on its device. Of a DTensor, also torch's rules for sharding must know the operator: of SGD's, those
            of torch 2.13 do not.
    """
    from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

    if optimizer not in FUSED_STEPS or not parameter.is_floating_point():
        return False
    if parameter.device.type not in _get_fused_kernels_supported_devices():
        return False
    return not hasattr(parameter, "device_mesh") or _shards(FUSED_STEPS[optimizer])


def _shards(operator: str) -> bool:
    from torch.distributed.tensor import DTensor

    propagator = DTensor._op_dispatcher.sharding_propagator
    tables = ("op_strategy_funcs", "op_single_dim_strategy_funcs", "op_to_rules")
    overload = getattr(torch.ops.aten, operator).default
    return any(overload in getattr(propagator, table, {}) for table in tables)


def fsdp_param_groups(state: Any) -> list[Any]:
    """Every `FSDPParamGroup` of an `FSDPState`: a list from torch 2.12 on, before it one or None."""
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:
        groups = [state._fsdp_param_group] if state._fsdp_param_group is not None else []
    return list(groups)


def separate_reduce_scatter_group(mesh_info: Any) -> dist.ProcessGroup | None:
    """The group that FSDP2 reduce-scatters over if not the one that it gathers over; there may be one from 2.13 on."""
    group: dist.ProcessGroup | None = getattr(mesh_info, "reduce_scatter_process_group", None)
    return group


HAS_GRAD_DTYPE = hasattr(torch.Tensor, "grad_dtype")
"""Whether gradients of a leaf may accumulate in another dtype than its own: without it FSDP2 gathers in float32."""


def reset_iter_state(root: Any) -> None:
    """Reshard every module of an FSDP2 root and forget the pass that was under way; a method of it from 2.13 on.

    `FSDPModule.reshard` would leave a module whose forward raised.
    """
    if hasattr(root, "reset_iter_state"):
        root.reset_iter_state()
        return
    from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

    state = root._get_fsdp_state()
    context, stream = state._comm_ctx, state._device_handle.current_stream()
    # Buffers of collectives that are under way may be freed when the stream that goes on has waited for them.
    listed = hasattr(context, "reduce_scatter_states")  # from torch 2.12 on
    scattered = context.reduce_scatter_states if listed else [context.reduce_scatter_state]
    for pending in (context.all_gather_state, *scattered):
        _wait(stream, None if pending is None else pending.event)
    context.all_gather_state = None
    if listed:
        context.reduce_scatter_states.clear()
    else:
        context.reduce_scatter_state = None
    context.post_forward_order.clear()
    for each in state._state_ctx.all_states:
        each._modules_to_run_forward.clear()
        each._training_state = TrainingState.IDLE
        for group in fsdp_param_groups(each):
            if (gathered := group._all_gather_result) is not None:
                _wait(stream, gathered.all_gather_event)
                if isinstance(gathered.all_gather_work, dist.Work):
                    gathered.all_gather_work.wait()
                group._all_gather_result = None
            group._wait_for_post_backward()
            if group._reshard_after_forward_event is not None:
                group._wait_all_gather_streams_on_event(group._reshard_after_forward_event)
                group._reshard_after_forward_event = None
            group._partial_reduce_output = None
            group._post_forward_indices.clear()
            group._training_state = TrainingState.IDLE
            group._to_sharded()
    state._state_ctx.iter_forward_root = None
    state._state_ctx.post_backward_final_callback_queued = False


def _wait(stream: Any, event: Any) -> None:
    if event is not None:
        stream.wait_event(event)

"""Bytes on the wire: a recorder of all collectives of a process, by torch's dispatcher.

All of them come past there: those of `torch.distributed` and of DeepSpeed, of FSDP2's hooks and of DDP's reducer, in a
forward as in a backward; what DTensors and functional collectives send counts, too. A recorder sees one process.

Bytes are counted in one way throughout: those that one process of W sends with the usual ring algorithm, whatever the
library that carries them does. With n the bytes of the whole tensor:

| collective | bytes sent by each process |
|---|---|
| all_reduce | 2 (W − 1) / W · n |
| all_gather | (W − 1) / W · n, n of what is gathered |
| reduce_scatter | (W − 1) / W · n, n of what is scattered |
| all_to_all, gather, scatter | (W − 1) / W · n; of pieces that differ, what this process sends to others |
| broadcast, reduce, send | n |
| barrier | 0 |

Small ones count like any other: a norm summed over the shards is an all_reduce of a few bytes.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import GroupName, _resolve_process_group
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Namespaces of the dispatcher's operators.
COLLECTIVES = ("c10d", "_c10d_functional")

# Of the dispatcher's operators: the collective, and which argument holds the whole tensor; −1 counts the results.
_WHOLE: dict[str, tuple[str, int]] = {
    "c10d::allreduce_": ("all_reduce", 0),
    "c10d::allreduce_coalesced_": ("all_reduce", 0),
    "c10d::allgather_": ("all_gather", 0),
    "c10d::_allgather_base_": ("all_gather", 0),
    "c10d::allgather_coalesced_": ("all_gather", 0),
    "c10d::allgather_into_tensor_coalesced_": ("all_gather", 0),
    "c10d::reduce_scatter_": ("reduce_scatter", 1),
    "c10d::_reduce_scatter_base_": ("reduce_scatter", 1),
    "c10d::reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1),
    "c10d::broadcast_": ("broadcast", 0),
    "c10d::reduce_": ("reduce", 0),
    "c10d::alltoall_": ("all_to_all", 1),
    "c10d::alltoall_base_": ("all_to_all", 1),
    "c10d::gather_": ("gather", 0),
    "c10d::scatter_": ("scatter", 1),
    "c10d::send": ("send", 0),
    "_c10d_functional::all_reduce": ("all_reduce", 0),
    "_c10d_functional::all_reduce_": ("all_reduce", 0),
    "_c10d_functional::all_reduce_coalesced": ("all_reduce", 0),
    "_c10d_functional::all_reduce_coalesced_": ("all_reduce", 0),
    "_c10d_functional::all_gather_into_tensor": ("all_gather", -1),
    "_c10d_functional::all_gather_into_tensor_out": ("all_gather", -1),
    "_c10d_functional::all_gather_into_tensor_coalesced": ("all_gather", -1),
    "_c10d_functional::reduce_scatter_tensor": ("reduce_scatter", 0),
    "_c10d_functional::reduce_scatter_tensor_out": ("reduce_scatter", 0),
    "_c10d_functional::reduce_scatter_tensor_coalesced": ("reduce_scatter", 0),
    "_c10d_functional::all_to_all_single": ("all_to_all", 0),
    "_c10d_functional::broadcast": ("broadcast", 0),
    "_c10d_functional::broadcast_": ("broadcast", 0),
    "_c10d_functional::isend": ("send", 0),
}
# Of `c10d::alltoall_base_`, where the rows that go to each process stand; none: as many to each.
_PIECES = 4
# These send nothing that is counted, or belong to a `send` that is.
_SILENT = {
    "c10d::barrier",
    "c10d::monitored_barrier_",
    "c10d::recv_",
    "c10d::recv_any_source_",
    "c10d::check_for_nan",
    "_c10d_functional::wait_tensor",
    "_c10d_functional::_wrap_tensor_autograd",
    "_c10d_functional::irecv",
}


def ring_bytes(collective: str, whole: float, size: int) -> float:
    """What one process sends, as the module's table says.

    Args:
        collective: one of the table's first column.
        whole: n, bytes.
        size: W, number of processes in the group.

    Raises:
        ValueError: there is no such collective, or no process.
    """
    if size < 1:
        raise ValueError(f"a group of {size} processes; at least 1 is needed")
    if size == 1 or collective == "barrier":
        return 0.0
    if collective in ("broadcast", "reduce", "send"):
        return float(whole)
    share = (size - 1) / size * whole
    if collective == "all_reduce":
        return 2.0 * share
    if collective in ("all_gather", "reduce_scatter", "all_to_all", "gather", "scatter"):
        return share
    raise ValueError(f"there is no collective {collective!r}")


class Traffic(TorchDispatchMode):
    """Counts, while it is entered, what this process sends.

    Args:
        strict: whether a collective that is not known raises, rather than being left out of the count.

    Attributes:
        bytes: sent by each collective, as `ring_bytes` counts them.
        calls: how often each was called, in groups of more than one process.

    Raises:
        NotImplementedError: a collective is called that is not known.
    """

    def __init__(self, *, strict: bool = True) -> None:
        super().__init__()
        self._strict = strict
        self.bytes: dict[str, float] = defaultdict(float)
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call the operator, and count it if it is a collective."""
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes back as operators on plain tensors, collectives among them
        result = func(*args, **(kwargs or {}))
        if getattr(func, "namespace", None) in COLLECTIVES:
            self._count(func._schema.name, [*args, *(kwargs or {}).values()], result)
        return result

    def _count(self, name: str, args: Sequence[Any], result: Any) -> None:
        if name in _SILENT:
            return
        if name not in _WHOLE:
            if not self._strict:
                return
            raise NotImplementedError(f"{name} is a collective whose bytes are not counted; add it to {__name__}")
        collective, position = _WHOLE[name]
        size, rank = _size_and_rank(args)
        if size == 1:
            return
        self.calls[collective] += 1
        if name == "c10d::alltoall_base_" and (pieces := args[_PIECES]):
            sent, rows = args[position], sum(pieces)
            self.bytes[collective] += sent.nbytes * (rows - pieces[rank]) / max(rows, 1)
        else:
            self.bytes[collective] += ring_bytes(collective, _nbytes(result if position < 0 else args[position]), size)


def _nbytes(tensors: Any) -> int:
    return sum(t.nbytes for t in tree_leaves(tensors) if isinstance(t, Tensor))


def _size_and_rank(args: Iterable[Any]) -> tuple[int, int]:
    """Of the process group among the arguments: itself, or its name, the last text."""
    name = None
    for arg in args:
        if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()):
            group = dist.ProcessGroup.unbox(arg)
            return int(group.size()), int(group.rank())
        if isinstance(arg, str):
            name = arg
    if name is None:
        raise NotImplementedError("a collective without a process group")
    group = _resolve_process_group(GroupName(name))
    return int(group.size()), int(group.rank())

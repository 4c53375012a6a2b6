"""NCCL's collectives on the pretended device: gloo's, on CPU tensors over the same memory."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch import Tensor


class _Done(dist._Work):
    """A collective that has ended; on a GPU, `wait` would make the stream wait and not the host."""

    def __init__(self, result: Sequence[Tensor]) -> None:
        super().__init__()
        self._future: torch.futures.Future[Any] = torch.futures.Future()
        self._future.set_result(list(result))

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Nothing to wait for."""
        return True

    def is_completed(self) -> bool:
        """It is."""
        return True

    def get_future(self) -> torch.futures.Future[Any]:
        """Of the tensors that it wrote."""
        return self._future


def _host(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [torch.ops.pretended.as_host(t.detach()) for t in tensors]


class ProcessGroupNCCL(dist.ProcessGroup):
    """A process group whose tensors are on the pretended device."""

    class Options:
        """What torch makes where it is given none, and sets."""

        _timeout: timedelta

    supports_splitting = False

    def __init__(self, store: Any, rank: int, size: int, options: Options) -> None:
        super().__init__(rank, size)
        self._gloo = dist.ProcessGroupGloo(store, rank, size, options._timeout)

    def _set_sequence_number_for_group(self) -> None:
        """Gloo has its own."""

    def _get_backend(self, device: Any) -> Any:
        return self

    def _set_group_name(self, name: str) -> None:
        self._name = name

    def _set_group_desc(self, description: str) -> None:
        self._description = description

    @property
    def group_name(self) -> str:
        """As torch named it."""
        return self._name

    @property
    def group_desc(self) -> str:
        """As torch described it."""
        return self._description

    def getBackendName(self) -> str:  # noqa: N802
        """As torch asks."""
        return "nccl"

    def _reduced(self, tensors: list[Tensor], options: Any) -> None:
        """Gloo cannot average."""
        average = options.reduceOp == dist.ReduceOp.AVG
        plain = dist.AllreduceOptions()
        plain.reduceOp = dist.ReduceOp.SUM if average else options.reduceOp
        for t in tensors:
            self._gloo.allreduce([t], plain).wait()
            if average:
                t.div_(self.size())

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> Any:
        """See `dist.all_reduce`."""
        self._reduced(_host(tensors), opts if opts is not None else dist.AllreduceOptions())
        return _Done(tensors)

    def allreduce_coalesced(self, tensors: list[Tensor], opts: Any = None) -> Any:
        """See `dist.all_reduce_coalesced`."""
        return self.allreduce(tensors, opts)

    def reduce(self, tensors: list[Tensor], opts: Any) -> Any:
        """See `dist.reduce`: here every rank gets the sum."""
        self._reduced(_host(tensors), opts)
        return _Done(tensors)

    def broadcast(self, tensors: list[Tensor], opts: Any) -> Any:
        """See `dist.broadcast`."""
        self._gloo.broadcast(_host(tensors), opts).wait()
        return _Done(tensors)

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> Any:
        """See `dist.all_gather`."""
        self._gloo.allgather([_host(each) for each in outputs], _host(inputs)).wait()
        return _Done([t for each in outputs for t in each])

    def _allgather_base(self, output: Tensor, input: Tensor, opts: Any = None) -> Any:
        [out], [part] = _host([output]), _host([input])
        pieces = [torch.empty_like(part) for _ in range(self.size())]
        self._gloo.allgather([pieces], [part.contiguous()]).wait()
        torch.cat([piece.reshape(-1) for piece in pieces], out=out.view(-1))
        return _Done([output])

    def allgather_into_tensor_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> Any:
        """See `dist.all_gather_into_tensor`."""
        for output, part in zip(outputs, inputs, strict=True):
            self._allgather_base(output, part)
        return _Done(outputs)

    def _reduce_scatter_base(self, output: Tensor, input: Tensor, opts: Any = None) -> Any:
        [out], [full] = _host([output]), _host([input])
        total = full.clone()
        self._reduced([total], opts if opts is not None else dist.ReduceScatterOptions())
        out.copy_(total.view(-1).chunk(self.size())[self.rank()].view_as(out))
        return _Done([output])

    def reduce_scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = None) -> Any:
        """See `dist.reduce_scatter`."""
        for output, pieces in zip(outputs, inputs, strict=True):
            totals = [piece.clone() for piece in _host(pieces)]
            self._reduced(totals, opts)
            _host([output])[0].copy_(totals[self.rank()])
        return _Done(outputs)

    def reduce_scatter_tensor_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> Any:
        """See `dist.reduce_scatter_tensor`."""
        for output, full in zip(outputs, inputs, strict=True):
            self._reduce_scatter_base(output, full, opts)
        return _Done(outputs)

    def alltoall_base(
        self, output: Tensor, input: Tensor, output_sizes: list[int], input_sizes: list[int], opts: Any = None
    ) -> Any:
        """See `dist.all_to_all_single`."""
        [out], [full] = _host([output]), _host([input])
        self._gloo.alltoall_base(out, full, output_sizes, input_sizes, dist.AllToAllOptions()).wait()
        return _Done([output])

    # As torch names them from 2.13 on.
    all_gather_single, reduce_scatter_single, all_to_all_single = _allgather_base, _reduce_scatter_base, alltoall_base

    def barrier(self, opts: Any = None) -> Any:
        """See `dist.barrier`."""
        self._gloo.barrier(dist.BarrierOptions()).wait()
        return _Done([])


def install() -> None:
    """`init_process_group("nccl")` finds it."""
    torch.cuda.nccl.version = lambda: (2, 0, 0)  # type: ignore[assignment]
    c10d.is_nccl_available = dist.is_nccl_available = lambda: True
    c10d.ProcessGroupNCCL = dist.ProcessGroupNCCL = ProcessGroupNCCL  # type: ignore[misc,assignment,attr-defined]

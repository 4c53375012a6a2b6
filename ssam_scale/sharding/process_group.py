"""The collectives of one process group, for one process alone as well, and leaving the default group."""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class ProcessGroup:
    """A `torch.distributed` process group with the collectives that are used here. Each method is collective.

    Args:
        group: the ranks; None: this process alone, which needs no `torch.distributed`.

    Attributes:
        size: number of ranks.
        rank: of this process in the group.
        ranks: in the default process group; of this process alone, none.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)
        self.ranks = [] if group is None else dist.get_process_group_ranks(group)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """`tensor` summed over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self._group)
        return tensor

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """The `tensor` of every rank, by rank; of the same shape and dtype on each.

        Args:
            tensor: on the device that the group communicates from.
        """
        if self.size == 1:
            return [tensor]
        tensors = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(tensors, tensor.contiguous(), group=self._group)
        return tensors

    def all_gather_object(self, value: Any) -> list[Any]:
        """The `value` of every rank, by rank.

        Args:
            value: small, and can be pickled.
        """
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def all_to_all(self, tensor: Tensor, sent: Sequence[int], received: Sequence[int]) -> list[Tensor]:
        """Split `tensor` into one piece for each rank, and exchange the pieces.

        Args:
            tensor: of shape (Σ sent,), of the same dtype on every rank; on any device.
            sent: elements that go to each rank.
            received: elements that come from each rank.

        Returns:
            What came from each rank, of shape (received,), on `tensor`'s device.
        """
        if self.size == 1:
            return [tensor]
        width = tensor.element_size()
        # As bytes, because not every dtype is known to every backend; where NCCL is, it takes CUDA tensors only.
        on_cuda = dist.get_backend(self._group) == "nccl"
        device = torch.device("cuda", torch.cuda.current_device()) if on_cuda else tensor.device
        out = torch.empty(sum(received) * width, dtype=torch.uint8, device=device)
        dist.all_to_all_single(
            out,
            tensor.contiguous().view(torch.uint8).to(device),
            [n * width for n in received],
            [n * width for n in sent],
            group=self._group,
        )
        return list(out.to(tensor.device).view(tensor.dtype).split(list(received)))


def leave_process_group() -> None:
    """Destroy the default process group, and what DeepSpeed remembers of it, so that another one can follow."""
    # gloo may abort the process at exit while wrappers of the group (DDP's reducer, FSDP's states) are alive.
    gc.collect()
    if (deepspeed := sys.modules.get("deepspeed")) is not None and deepspeed.comm.is_initialized():
        deepspeed.comm.destroy_process_group()
    if dist.is_initialized():
        dist.destroy_process_group()

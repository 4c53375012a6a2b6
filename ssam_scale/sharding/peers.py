"""The processes that a batch is spread over, and what they send each other beside gradients and weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Peers:
    """All data-parallel processes, this one among them, in the order of their parts of a batch.

    Each method is collective.

    Args:
        group: the processes; None: this one alone.

    Attributes:
        size: how many they are.
        rank: index of this process among them.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)

    def tell(self, fact: Any) -> list[Any]:
        """What every process said, in their order.

        Args:
            fact: small, and can be pickled.
        """
        if self.size == 1:
            return [fact]
        facts: list[Any] = [None] * self.size
        dist.all_gather_object(facts, fact, group=self._group)
        return facts

    def deal(self, tensor: Tensor, sent: Sequence[int], received: Sequence[int]) -> list[Tensor]:
        """Cut `tensor` into one run for each process, and exchange the runs.

        Args:
            tensor: of shape (Σ sent,), of the same dtype on every process; on any device.
            sent: elements that go to each process.
            received: elements that come from each process.

        Returns:
            What came from each process, of shape (received,), on `tensor`'s device.
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

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The `tensor` of every process, in their order; of the same shape and dtype on each.

        Args:
            tensor: on the device that the processes communicate from.
        """
        if self.size == 1:
            return [tensor]
        tensors = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(tensors, tensor.contiguous(), group=self._group)
        return tensors

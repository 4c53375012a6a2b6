"""The processes of one run and their devices."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ssam_scale.errors import UserError


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


# A rank that waits longer for another one ends the job instead of hanging it.
TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class World:
    """One process's place among all of them.

    Attributes:
        rank: index of this process, 0 to size − 1.
        size: number of processes.
        device: where this process computes.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def first(self) -> bool:
        """Whether this process is the one that prints, tracks and writes."""
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """`value` summed over all processes, in place; the same on each."""
        if self.size > 1:
            dist.all_reduce(value)
        return value


@contextmanager
def join_world(timeout: timedelta = TIMEOUT) -> Iterator[World]:
    """Join the processes that torchrun or deepspeed started; alone without their environment variables.

    Uses NCCL on CUDA and gloo on the CPU.

    Args:
        timeout: a collective that waits longer for another process raises.

    Raises:
        UserError: processes were started without telling them of each other, or there are more of them than GPUs.
    """
    if "RANK" not in os.environ:
        for variable in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
            if int(os.environ.get(variable, "1")) > 1:
                raise UserError(
                    f"{variable} is {os.environ[variable]} but RANK is not set, so each process would train alone; "
                    "start them with torchrun or deepspeed (slurm/imagenet_ssam.sh does)"
                )
    size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"process {local_rank} of this machine has no GPU: there are {torch.cuda.device_count()}")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    world = World(rank, size, device)
    if "RANK" not in os.environ:
        yield world
        return
    if device.type == "cuda":
        dist.init_process_group("nccl", timeout=timeout, device_id=device)
    else:
        dist.init_process_group("gloo", timeout=timeout)
    failed = True
    try:
        yield world
        failed = False
    finally:
        # Destroying an NCCL group waits for the collectives under way. After an exception the other processes may never
        # come to them, and NCCL's watchdog would end this process before it could say what went wrong.
        if not (failed and device.type == "cuda"):
            # gloo may abort the process at exit while wrappers of the group (DDP's reducer, FSDP's states) are alive.
            gc.collect()
            dist.destroy_process_group()


def leave_process_group() -> None:
    """Destroy the default process group, and what DeepSpeed remembers of it, so that another one can follow."""
    if (deepspeed := sys.modules.get("deepspeed")) is not None and deepspeed.comm.is_initialized():
        deepspeed.comm.destroy_process_group()
    if dist.is_initialized():
        dist.destroy_process_group()

"""DistributedDataParallel: every process holds all of the weights and sees its own part of the batch."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.nn.parallel import DistributedDataParallel

from .base import Unsharded
from .peers import Peers


def without_buffer_sync() -> dict[str, Any]:
    """The argument that keeps DDP from broadcasting buffers in each forward; it was renamed in torch 2.13."""
    renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    return {"forward_sync_buffers" if renamed else "broadcast_buffers": False}


class DDP(Unsharded):
    """The ascent runs on the module inside, where DDP's reducer does not listen, and reduces what is perturbed itself.

    The reducer expects a gradient of every parameter in each synchronised backward; an ascent pass has only those of
    the perturbed weights. The descent pass goes through DDP and its overlap of communication and backward.

    Raises:
        ValueError: DDP broadcasts buffers in each forward, which overwrites the BatchNorm statistics that the graph of
            a shared prefix still needs.
    """

    def __init__(self, module: DistributedDataParallel) -> None:
        syncs = getattr(module, "forward_sync_buffers", None)
        if (module.broadcast_buffers if syncs is None else syncs) and any(True for _ in module.module.buffers()):
            raise ValueError(
                "DistributedDataParallel broadcasts buffers in each forward, also between the two passes of one step; "
                "build it with forward_sync_buffers=False and average BatchNorm statistics before evaluation"
            )
        self.network: nn.Module = module.module
        self.ascent_module: nn.Module = module.module
        self.descent_module: nn.Module = module
        self._ddp = module
        self._group = module.process_group
        self.peers = Peers(self._group)

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """The reducer works in the last micro-batch only. It ignores passes on the inner module by itself."""
        try:
            with nullcontext() if last else self._ddp.no_sync():
                yield
        except BaseException:
            # The reducer waits for the backward that its forward announced, and refuses the next forward until then.
            self._ddp.reducer._reset_state()
            raise

    def reduce_ascent(self, parameters: Sequence[nn.Parameter]) -> None:
        """One averaging all-reduce per dtype over the gradients of `parameters`."""
        by_dtype: dict[object, list[nn.Parameter]] = {}
        for p in parameters:
            if p.grad is None:  # here, but perhaps not on another process, and all reduce the same
                p.grad = torch.zeros_like(p)
            by_dtype.setdefault(p.grad.dtype, []).append(p)
        for group in by_dtype.values():
            gradients = [p.grad for p in group if p.grad is not None]
            flat = _flatten_dense_tensors(gradients)
            flat.div_(dist.get_world_size(self._group))
            dist.all_reduce(flat, group=self._group)
            for p, reduced in zip(group, _unflatten_dense_tensors(flat, gradients), strict=True):
                p.grad = reduced

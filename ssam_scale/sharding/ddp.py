"""DistributedDataParallel: every process holds all of the weights and sees its own part of the batch."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .interface import Elements, Needed
from .registry import Backend, MakeOptimizer, Options, register
from .unsharded import Unsharded
from .world import Peers, World

# Few enough messages that starting them costs nothing, and small enough to leave early. DDP's choice, too.
_BUCKET_BYTES = 25 << 20


class _Bucket:
    """Gradients, of one dtype, that are sent in one message.

    Attributes:
        parameters: whose gradients.
        parts: what is sent of each; None: all of it.
        missing: the parameters that the backward under way has no gradient of yet, by identity.
        flat: what was sent, of shape (elements,).
        work: the sending; None before.
    """

    def __init__(self) -> None:
        self.parameters: list[nn.Parameter] = []
        self.parts: list[Elements | None] = []
        self.missing: set[int] = set()
        self.flat: Tensor | None = None
        self.work: dist.Work | None = None
        self._bytes = 0

    def add(self, parameter: nn.Parameter, part: Elements | None) -> bool:
        """Take a parameter, unless the bucket is full."""
        size = (parameter.numel() if part is None else part.count) * parameter.element_size()
        if self.parameters and self._bytes + size > _BUCKET_BYTES:
            return False
        self._bytes += size
        self.parameters.append(parameter)
        self.parts.append(part)
        self.missing.add(id(parameter))
        return True

    def send(self, group: dist.ProcessGroup | None) -> None:
        """Begin to sum the gradients, divided by the number of processes. What has none counts as zeros."""
        pieces = []
        for p, part in zip(self.parameters, self.parts, strict=True):
            if p.grad is None:  # here, but perhaps not on another process, and all send the same
                p.grad = torch.zeros_like(p)
            pieces.append(p.grad.reshape(-1) if part is None else part.take(p.grad))
        self.flat = torch.cat(pieces).div_(dist.get_world_size(group))
        for p, part, piece in zip(self.parameters, self.parts, self._cut(), strict=True):
            if part is None:  # the old gradient goes now, not when the sum is there
                p.grad = piece.view(p.shape)
        self.work = dist.all_reduce(self.flat, group=group, async_op=True)

    def receive(self) -> None:
        """Wait for the sums, on the device, and write packed ones to their places."""
        assert self.work is not None
        self.work.wait()
        for p, part, piece in zip(self.parameters, self.parts, self._cut(), strict=True):
            if part is not None:
                assert p.grad is not None
                part.put(p.grad, piece)
        self.flat = None

    def _cut(self) -> Sequence[Tensor]:
        assert self.flat is not None
        return self.flat.split(
            [p.numel() if part is None else part.count for p, part in zip(self.parameters, self.parts, strict=True)]
        )


class Averaging:
    """Sends gradients in buckets, each as soon as it and all before it are complete.

    The order of the buckets is that of the parameters, last ones first, so roughly that of a backward, and the same on
    every process whatever the order in which its gradients come.

    Args:
        needed: the parameters and their parts.
        group: the processes.
    """

    def __init__(self, needed: Needed, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self._buckets: list[_Bucket] = []
        self._sent = 0
        self._last = False
        self._bucket_of: list[tuple[nn.Parameter, _Bucket]] = []
        open_buckets: dict[torch.dtype, _Bucket] = {}
        for p, part in zip(reversed(needed.parameters), reversed(needed.parts), strict=True):
            if part is not None and part.count == 0:
                continue
            if (bucket := open_buckets.get(p.dtype)) is None or not bucket.add(p, part):
                bucket = open_buckets[p.dtype] = _Bucket()
                bucket.add(p, part)
                self._buckets.append(bucket)
            self._bucket_of.append((p, bucket))

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Backwards inside tell of their gradients."""
        handles = [
            p.register_post_accumulate_grad_hook(partial(self._has_come, bucket)) for p, bucket in self._bucket_of
        ]
        try:
            yield
        finally:  # what was sent is not waited for: after an exception it may never come back
            for handle in handles:
                handle.remove()

    @property
    def under_way(self) -> bool:
        """Whether a message has been sent and has not come back."""
        return any(bucket.work is not None and not bucket.work.is_completed() for bucket in self._buckets)

    def begin_last(self) -> None:
        """The next backward is the last one: what it leaves is sent."""
        self._last = True

    def _has_come(self, bucket: _Bucket, parameter: nn.Parameter) -> None:
        if not self._last:
            return
        if bucket.work is not None:
            raise RuntimeError(
                f"a backward came again to a parameter of shape {tuple(parameter.shape)} whose gradient had been sent, "
                "as reentrant checkpointing of a shared weight does; use checkpointing with use_reentrant=False"
            )
        bucket.missing.discard(id(parameter))
        while self._sent < len(self._buckets) and not self._buckets[self._sent].missing:
            self._send_next()

    @torch.no_grad()
    def finish(self) -> None:
        """Send the rest and wait for everything, if this was the last backward."""
        if not self._last:
            return
        while self._sent < len(self._buckets):
            self._send_next()
        for bucket in self._buckets:
            bucket.receive()

    def _send_next(self) -> None:
        self._buckets[self._sent].send(self._group)
        self._sent += 1


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
        self.packs = self.peers.size > 1
        self._averaging: Averaging | None = None
        self._given_up: list[Averaging] = []  # not waited for, but their memory is still written to

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """The reducer works in the last micro-batch only. It ignores passes on the inner module by itself."""
        if last and self._averaging is not None:
            self._averaging.begin_last()
        try:
            with nullcontext() if last else self._ddp.no_sync():
                yield
        except BaseException:
            # The reducer waits for the backward that its forward announced, and refuses the next forward until then.
            self._ddp.reducer._reset_state()
            raise

    @contextmanager
    def ascent(self, needed: Needed) -> Iterator[None]:
        """Averaging all-reduces of no more than the parts, under way while the last backward still goes on."""
        if self.peers.size == 1:
            yield
            return
        self._given_up = [averaging for averaging in self._given_up if averaging.under_way]
        self._averaging = averaging = Averaging(needed, self._group)
        try:
            with averaging.listening():
                yield
        except BaseException:
            self._given_up.append(averaging)
            raise
        finally:
            self._averaging = None

    def backward(self, loss: Tensor) -> None:
        """Autograd's, and in an ascent the end of averaging."""
        super().backward(loss)
        if self._averaging is not None:
            self._averaging.finish()


def _place(
    module: nn.Module, make_optimizer: MakeOptimizer, world: World, options: Options
) -> tuple[nn.Module, torch.optim.Optimizer]:
    # The argument that keeps DDP from broadcasting buffers in each forward was renamed in torch 2.13.
    renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    sync: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    ids = [world.device.index] if world.device.type == "cuda" else None
    return DistributedDataParallel(module, device_ids=ids, **sync), make_optimizer()


register(
    Backend(
        "ddp",
        "every rank holds all weights; gradients are all-reduced",
        "PyTorch DistributedDataParallel, arXiv 2006.15704",
        owns=lambda module: isinstance(module, DistributedDataParallel),
        sharding=DDP,
        place=_place,
    )
)

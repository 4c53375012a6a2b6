"""DistributedDataParallel: every rank holds all weights and sees its own part of the batch.

The ascent's gradients are all-reduced here, masked elements only, and not by DDP's reducer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ssam_scale.torch_compat import FORWARD_SYNC_BUFFERS, broadcasts_buffers

from .gradient_hooks import removing
from .interface import AscentReduction, Elements
from .process_group import ProcessGroup
from .registry import BACKENDS, Backend, MakeOptimizer, Options
from .unsharded import ReplicatedWeights, TorchTraining
from .world import World

# Few enough messages that starting them costs nothing, and small enough to leave early. DDP's choice, too.
_BUCKET_BYTES = 25 << 20


class _Bucket:
    """Gradients, of one dtype, that one all-reduce sums.

    Attributes:
        parameters: whose gradients.
        elements: which of each are reduced; None: all of them.
        missing: the parameters that the current backward has no gradient of yet, by identity.
        flat: the buffer that is reduced, of shape (elements,).
        work: the all-reduce; None before it starts.
    """

    def __init__(self) -> None:
        self.parameters: list[nn.Parameter] = []
        self.elements: list[Elements | None] = []
        self.missing: set[int] = set()
        self.flat: Tensor | None = None
        self.work: dist.Work | None = None
        self._bytes = 0

    def add(self, parameter: nn.Parameter, elements: Elements | None) -> bool:
        """Take a parameter, unless the bucket is full."""
        size = (parameter.numel() if elements is None else elements.count) * parameter.element_size()
        if self.parameters and self._bytes + size > _BUCKET_BYTES:
            return False
        self._bytes += size
        self.parameters.append(parameter)
        self.elements.append(elements)
        self.missing.add(id(parameter))
        return True

    def start(self, group: dist.ProcessGroup | None) -> None:
        """Start the all-reduce of the gradients, divided by the number of ranks; a missing gradient counts as zeros."""
        pieces = []
        for p, elements in zip(self.parameters, self.elements, strict=True):
            if p.grad is None:  # here, but perhaps not on another rank, and all reduce the same
                p.grad = torch.zeros_like(p)
            pieces.append(p.grad.reshape(-1) if elements is None else elements.take(p.grad))
        self.flat = torch.cat(pieces).div_(dist.get_world_size(group))
        for p, elements, piece in zip(self.parameters, self.elements, self._split(), strict=True):
            if elements is None:  # frees the unreduced gradient now, not when the sum is there
                p.grad = piece.view(p.shape)
        self.work = dist.all_reduce(self.flat, group=group, async_op=True)

    def finish(self) -> None:
        """Wait for the all-reduce, on the device, and write packed elements back to their gradients."""
        assert self.work is not None
        self.work.wait()
        for p, elements, piece in zip(self.parameters, self.elements, self._split(), strict=True):
            if elements is not None:
                assert p.grad is not None
                elements.put(p.grad, piece)
        self.flat = None

    def _split(self) -> Sequence[Tensor]:
        assert self.flat is not None
        return self.flat.split(
            [p.numel() if e is None else e.count for p, e in zip(self.parameters, self.elements, strict=True)]
        )


class BucketedAllReduce:
    """Bucketed all-reduce of the gradients, or of the masked elements of them, overlapped with the last backward.

    A bucket is reduced as soon as it and all before it are complete. The order of the buckets is that of the
    parameters, last ones first, so roughly that of a backward, and the same on every rank whatever the order in which
    its gradients come.

    Args:
        reduction: the parameters and their elements.
        group: the data-parallel ranks.
    """

    def __init__(self, reduction: AscentReduction, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self._buckets: list[_Bucket] = []
        self._started = 0
        self._last = False
        self._bucket_of: list[tuple[nn.Parameter, _Bucket]] = []
        open_buckets: dict[torch.dtype, _Bucket] = {}
        for p, elements in zip(reversed(reduction.parameters), reversed(reduction.local), strict=True):
            if elements is not None and elements.count == 0:
                continue
            if (bucket := open_buckets.get(p.dtype)) is None or not bucket.add(p, elements):
                bucket = open_buckets[p.dtype] = _Bucket()
                bucket.add(p, elements)
                self._buckets.append(bucket)
            self._bucket_of.append((p, bucket))

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Backwards inside start all-reduces from hooks on the parameters."""
        # What was started is not waited for on the way out: after an exception it may never end.
        with removing(
            p.register_post_accumulate_grad_hook(partial(self._on_gradient, bucket)) for p, bucket in self._bucket_of
        ):
            yield

    @property
    def pending(self) -> bool:
        """Whether an all-reduce was started and has not ended."""
        return any(bucket.work is not None and not bucket.work.is_completed() for bucket in self._buckets)

    def expect_last(self) -> None:
        """The next backward is that of the last micro-batch: what it leaves is reduced."""
        self._last = True

    def _on_gradient(self, bucket: _Bucket, parameter: nn.Parameter) -> None:
        if not self._last:
            return
        if bucket.work is not None:
            raise RuntimeError(
                f"a backward came again to a parameter of shape {tuple(parameter.shape)} whose gradient had been sent, "
                "as reentrant checkpointing of a shared weight does; use checkpointing with use_reentrant=False"
            )
        bucket.missing.discard(id(parameter))
        while self._started < len(self._buckets) and not self._buckets[self._started].missing:
            self._start_next()

    @torch.no_grad()
    def finish(self) -> None:
        """Start the rest and wait for everything, if this was the last backward."""
        if not self._last:
            return
        while self._started < len(self._buckets):
            self._start_next()
        for bucket in self._buckets:
            bucket.finish()

    def _start_next(self) -> None:
        self._buckets[self._started].start(self._group)
        self._started += 1


class DDP(ReplicatedWeights, TorchTraining):
    """The ascent runs on the inner module, past DDP's reducer, and all-reduces the gradients that it needs itself.

    The reducer expects a gradient of every parameter in each synchronised backward; an ascent pass has only those of
    the perturbed weights. The descent pass goes through DDP and its overlap of communication and backward.

    Raises:
        ValueError: DDP broadcasts buffers in each forward, which overwrites the BatchNorm statistics that the graph of
            a shared prefix still needs.
    """

    def __init__(self, module: DistributedDataParallel) -> None:
        if broadcasts_buffers(module) and any(True for _ in module.module.buffers()):
            raise ValueError(
                "DistributedDataParallel broadcasts buffers in each forward, also between the two passes of one step; "
                f"build it with {FORWARD_SYNC_BUFFERS}=False and average BatchNorm statistics before evaluation"
            )
        self.network: nn.Module = module.module
        self.ascent_module: nn.Module = module.module
        self.descent_module: nn.Module = module
        self._ddp = module
        self._group = module.process_group
        self.data_parallel_group = ProcessGroup(self._group)
        self.packs_gradients = self.data_parallel_group.size > 1
        self._reduction: BucketedAllReduce | None = None
        # Those that an exception interrupted: nobody waits for them, but their buffers are still written to.
        self._abandoned: list[BucketedAllReduce] = []

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """DDP's reducer works in the last micro-batch only. It ignores passes on the inner module by itself."""
        if last and self._reduction is not None:
            self._reduction.expect_last()
        try:
            with nullcontext() if last else self._ddp.no_sync():
                yield
        except BaseException:
            # The reducer waits for the backward that its forward announced, and refuses the next forward until then.
            self._ddp.reducer._reset_state()
            raise

    @contextmanager
    def ascent(self, reduction: AscentReduction) -> Iterator[None]:
        """Bucketed all-reduce of the elements that are asked for, overlapped with the last backward."""
        if self.data_parallel_group.size == 1:
            yield
            return
        self._abandoned = [earlier for earlier in self._abandoned if earlier.pending]
        self._reduction = current = BucketedAllReduce(reduction, self._group)
        try:
            with current.hooked():
                yield
        except BaseException:
            self._abandoned.append(current)
            raise
        finally:
            self._reduction = None

    def backward(self, loss: Tensor) -> None:
        """Autograd's; in an ascent it ends when the gradients are reduced."""
        super().backward(loss)
        if self._reduction is not None:
            self._reduction.finish()


def _place(
    module: nn.Module, make_optimizer: MakeOptimizer, world: World, options: Options
) -> tuple[nn.Module, torch.optim.Optimizer]:
    sync: dict[str, Any] = {FORWARD_SYNC_BUFFERS: False}
    ids = [world.device.index] if world.device.type == "cuda" else None
    return DistributedDataParallel(module, device_ids=ids, **sync), make_optimizer()


BACKENDS.register(
    "ddp",
    "every rank holds all weights; gradients are all-reduced",
    "PyTorch DistributedDataParallel, arXiv 2006.15704",
)(
    Backend(
        owns=lambda module: isinstance(module, DistributedDataParallel),
        sharding=DDP,
        place=_place,
        shards_weights=False,
        any_memory_format=True,
    )
)

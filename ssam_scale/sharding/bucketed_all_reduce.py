"""The ascent's reduction where every rank computes whole gradients: a bucketed all-reduce of the masked elements.

For DDP, and for ZeRO 0 to 2, whose ranks all hold whole weights too: each then perturbs all of them by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .gradient_hooks import removing
from .interface import AscentReduction, Elements

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

    def start(self, group: dist.ProcessGroup | None, dtype: torch.dtype | None) -> None:
        """Start the all-reduce of the gradients, divided by the number of ranks; a missing gradient counts as zeros."""
        gradients = []
        for p in self.parameters:
            if p.grad is None:  # here, but perhaps not on another rank, and all reduce the same
                p.grad = torch.zeros_like(p)
            gradients.append(p.grad)
        pieces = [g.reshape(-1) for g in gradients]
        some, places = self._subsets()
        if some:
            found = some[0].masked_select([gradients[i] for i in places], some)
            for i, piece in zip(places, found, strict=True):
                pieces[i] = piece
        self.flat = torch.cat(pieces).to(dtype=dtype).div_(dist.get_world_size(group))
        for p, elements, piece in zip(self.parameters, self.elements, self._split(), strict=True):
            if elements is None and piece.dtype == p.dtype:  # frees the unreduced gradient now, not with the sum
                p.grad = piece.view(p.shape)
        self.work = dist.all_reduce(self.flat, group=group, async_op=True)

    def finish(self) -> None:
        """Wait for the all-reduce, on the device, and write what is not there yet to the gradients."""
        assert self.work is not None
        self.work.wait()
        gradients, pieces = [], []
        for p, elements, piece in zip(self.parameters, self.elements, self._split(), strict=True):
            assert p.grad is not None
            gradients.append(p.grad)
            pieces.append(piece)
            if elements is None and piece.dtype != p.dtype:
                p.grad.copy_(piece.view(p.shape))
        some, places = self._subsets()
        if some:
            values = [pieces[i].to(gradients[i].dtype) for i in places]
            some[0].masked_scatter_([gradients[i] for i in places], some, values)
        self.flat = None

    def _subsets(self) -> tuple[list[Elements], list[int]]:
        """The elements of each parameter that is not reduced in full, and which parameters these are."""
        places = [i for i, elements in enumerate(self.elements) if elements is not None]
        return [elements for elements in self.elements if elements is not None], places

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
        reduction: the parameters and the elements of their full gradients.
        group: the data-parallel ranks.
        dtype: to reduce in; None: the gradients' own.
    """

    def __init__(
        self, reduction: AscentReduction, group: dist.ProcessGroup | None, dtype: torch.dtype | None = None
    ) -> None:
        self._group, self._dtype = group, dtype
        self._buckets: list[_Bucket] = []
        self._started = 0
        self._last = False
        self._bucket_of: list[tuple[nn.Parameter, _Bucket]] = []
        open_buckets: dict[torch.dtype, _Bucket] = {}
        for p, elements in zip(reversed(reduction.parameters), reversed(reduction.full), strict=True):
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
        self._buckets[self._started].start(self._group, self._dtype)
        self._started += 1


class AscentAllReduce:
    """The `BucketedAllReduce` of the ascent that is under way, if one is, and those that exceptions interrupted.

    Args:
        group: the data-parallel ranks.
        dtype: to reduce in; None: the gradients' own.
    """

    def __init__(self, group: dist.ProcessGroup | None, dtype: torch.dtype | None = None) -> None:
        self._group, self._dtype = group, dtype
        self._current: BucketedAllReduce | None = None
        # Nobody waits for them, but their buffers are still written to.
        self._abandoned: list[BucketedAllReduce] = []

    @contextmanager
    def of(self, reduction: AscentReduction) -> Iterator[None]:
        """The last backward inside reduces the elements that are asked for."""
        self._abandoned = [earlier for earlier in self._abandoned if earlier.pending]
        self._current = current = BucketedAllReduce(reduction, self._group, self._dtype)
        try:
            with current.hooked():
                yield
        except BaseException:
            self._abandoned.append(current)
            raise
        finally:
            self._current = None

    def expect_last(self) -> None:
        """The next backward is that of the last micro-batch; of an ascent, if one is under way."""
        if self._current is not None:
            self._current.expect_last()

    def finish(self) -> None:
        """A backward is over: if it was an ascent's last, start what is left and wait for everything."""
        if self._current is not None:
            self._current.finish()

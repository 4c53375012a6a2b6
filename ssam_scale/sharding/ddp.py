"""DistributedDataParallel: every process holds all of the weights and sees its own part of the batch."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .averaging import Averaging
from .base import Unsharded
from .needs import Needed
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

"""DistributedDataParallel: every rank holds all weights and sees its own part of the batch.

The ascent's gradients are all-reduced here, masked elements only, and not by DDP's reducer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ssam_scale.torch_compat import FORWARD_SYNC_BUFFERS, broadcasts_buffers

from .bucketed_all_reduce import AscentAllReduce
from .gradient_hooks import OnGradient
from .interface import AscentReduction
from .process_group import ProcessGroup
from .registry import BACKENDS, Backend, MakeOptimizer, Options
from .unsharded import ReplicatedWeights, TorchTraining
from .world import World


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
        self.data_parallel_group = ProcessGroup(module.process_group)
        self.packs_gradients = self.data_parallel_group.size > 1
        self._all_reduce = AscentAllReduce(module.process_group)
        self._ascends = False
        self._known: set[int] | None = None  # the parameters that DDP reduces gradients of, by identity

    def unwrap_optimizer(
        self, optimizer: torch.optim.Optimizer, max_grad_norm: float | None
    ) -> tuple[torch.optim.Optimizer, list[list[nn.Parameter]]]:
        """The optimizer itself and its parameters that are not frozen.

        Raises:
            ValueError: a parameter is trained that DDP does not know, so that the copies would drift apart.
        """
        self._check_known()
        return super().unwrap_optimizer(optimizer, max_grad_norm)

    def _check_known(self) -> None:
        if self.data_parallel_group.size == 1:
            return
        ignored = self._ddp.parameters_to_ignore
        named = ((n, p) for n, p in self.network.named_parameters() if p.requires_grad and n not in ignored)
        trained = {id(p): name for name, p in named}
        if self._known is None:
            if int(self._ddp._get_ddp_logging_data()["num_parameter_tensors"]) == len(trained):
                self._known = set(trained)
            else:  # The buckets tell which they are, and it takes memory for a gradient to ask for them.
                buckets = self._ddp.reducer._get_zeros_like_grad_buckets()
                self._known = {id(p) for bucket in buckets for p in bucket.parameters()}
        unknown = [name for parameter, name in trained.items() if parameter not in self._known]
        if unknown:
            raise ValueError(
                f"{len(unknown)} parameters that require gradients now (the first: {unknown[0]}) were frozen, or not "
                "there, when DistributedDataParallel was built, which so averages no gradients of them: build it while "
                "all that is ever trained requires gradients, with find_unused_parameters=True, and freeze after that"
            )

    def _refuse_static_graph(self) -> None:
        if self._ddp.static_graph and self.data_parallel_group.size > 1:
            raise ValueError(
                "DistributedDataParallel with static_graph=True takes a backward past it, an ascent's or that of a "
                "mask's scores, for its own first one, and averages no gradients from then on: build it with "
                "static_graph=False, or run both passes through it, by opt.step(closure) or `with opt.perturbed()`"
            )

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """DDP's reducer works in the last micro-batch only. It ignores passes on the inner module by itself.

        Raises:
            ValueError: the loss function called the model, or DDP, and not the `forward` that it was given.
        """
        if last:
            self._all_reduce.expect_last()
        ddp: Any = self._ddp
        synced, ddp.require_forward_param_sync = ddp.require_forward_param_sync, None  # each forward sets it
        try:
            with self._syncing() if last else self._ddp.no_sync():
                yield
                passed = ddp.require_forward_param_sync is not None
            wrong = passed if self._ascends else last and not passed
            if wrong and self.data_parallel_group.size > 1:
                raise ValueError(
                    "the loss function called the model, or DDP, in the place of the `forward` that it was given, so "
                    "that gradients are averaged twice or not at all: loss_fn(forward, batch) calls forward"
                )
        except BaseException:
            # The reducer waits for the backward that its forward announced, and refuses the next forward until then.
            self._ddp.reducer._reset_state()
            raise
        finally:
            if ddp.require_forward_param_sync is None:
                ddp.require_forward_param_sync = synced

    @contextmanager
    def _syncing(self) -> Iterator[None]:
        """A step is by averaged gradients, within `no_sync` too: without these the copies would drift apart."""
        syncs, self._ddp.require_backward_grad_sync = self._ddp.require_backward_grad_sync, True
        try:
            yield
        finally:
            self._ddp.require_backward_grad_sync = syncs

    @contextmanager
    def ascent(self, reduction: AscentReduction) -> Iterator[None]:
        """Bucketed all-reduce of the elements that are asked for, overlapped with the last backward."""
        if self.data_parallel_group.size == 1:
            yield
            return
        self._refuse_static_graph()
        if self._ddp._join_config.enable:
            raise ValueError(
                "the step is within DistributedDataParallel.join, which stands in for the all-reduces of DDP and not "
                "for those of an ascent: give every process as many batches, as DistributedSampler does"
            )
        self._ascends = True
        try:
            with self._all_reduce.of(reduction):
                yield
        finally:
            self._ascends = False

    def capture_gradients(
        self, parameters: Sequence[nn.Parameter], on_gradient: OnGradient
    ) -> AbstractContextManager[None]:
        """Takes them away from `.grad`."""
        self._refuse_static_graph()
        return super().capture_gradients(parameters, on_gradient)

    def backward(self, loss: Tensor) -> None:
        """Autograd's; in an ascent it ends when the gradients are reduced."""
        super().backward(loss)
        self._all_reduce.finish()


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
        title="DDP",
        owns=lambda module: isinstance(module, DistributedDataParallel),
        sharding=DDP,
        place=_place,
        any_memory_format=True,
        held_beside=lambda weights, deepspeed: 4 * weights,  # the buckets that gradients are reduced in
    )
)

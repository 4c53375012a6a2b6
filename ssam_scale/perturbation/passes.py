"""How one optimizer step runs its two passes over micro-batches, with or without a shared prefix."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ssam_scale.sharding import Sharding

from .batchnorm import frozen_statistics
from .phases import Phase, Phases

Forward = Callable[..., Any]
LossFn = Callable[[Forward, Any], Tensor]


@contextmanager
def without_gradient(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Forwards inside keep no graph towards `parameters`, so their gradient is neither computed nor saved for."""
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)


class Passes:
    """The ascent and the descent pass of one step.

    With a cut above 0 and one micro-batch, the prefix before the cut runs once: its output is detached for the ascent
    and used with its graph in the descent. With several micro-batches the graphs of all prefixes would have to be kept,
    which is the memory that accumulation saves; then the ascent runs the prefix without a graph instead.

    Args:
        sharding: what to run.
        cut: index of the first perturbed block.
        loss_fn: mean loss of a batch, given the forward to use.
        batches: the micro-batches of this process.
        backward: accumulates the gradients of a loss.
        phases: who measures.
    """

    def __init__(
        self,
        sharding: Sharding,
        cut: int,
        loss_fn: LossFn,
        batches: Sequence[Any],
        backward: Callable[[Tensor], None],
        phases: Phases,
    ) -> None:
        self._sharding = sharding
        self._cut = cut
        self._loss_fn = loss_fn
        self._batches = batches
        self._backward = backward
        self._phases = phases
        self._prefix: tuple[Any, Tensor] | None = None

    def ascend(self) -> Tensor:
        """Forward and backward at w over all micro-batches; gradients are left reduced. Returns the mean loss."""
        return self._run(self._ascent_forward, "ascent backward")

    def descend(self, *, statistics: bool) -> Tensor:
        """Forward and backward at the weights as they are, with the gradient of every parameter; returns the mean loss.

        Args:
            statistics: whether this pass is the one that updates BatchNorm's running statistics.
        """
        if statistics:
            return self._run(self._descent_forward, "descent backward")
        with frozen_statistics(self._sharding.network):
            return self._run(self._descent_forward, "descent backward")

    def _run(self, forward: Forward, backward_phase: Phase) -> Tensor:
        losses = []
        for index, batch in enumerate(self._batches):
            with self._sharding.micro_batch(last=index == len(self._batches) - 1):
                loss = self._loss_fn(forward, batch) / len(self._batches)
                with self._phases(backward_phase):
                    self._backward(loss)
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    def _ascent_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        module = self._sharding.ascent_module
        if self._cut == 0:
            with self._phases("ascent forward"):
                return module(x, *args, **kwargs)
        shared = len(self._batches) == 1
        with self._phases("descent forward" if shared else "ascent forward"), torch.set_grad_enabled(shared):
            hidden = module(x, stop=self._cut)
        if shared:
            if self._prefix is not None:
                raise ValueError("the loss function called `forward` twice; with a cut, concatenate the inputs instead")
            self._prefix = (x, hidden)
        with self._phases("ascent forward"):
            return module(hidden.detach(), start=self._cut)

    def _descent_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        module = self._sharding.descent_module
        with self._phases("descent forward"):
            if self._prefix is None:
                return module(x, *args, **kwargs)
            seen, hidden = self._prefix
            if seen is not x:
                raise ValueError(
                    "the loss function gave the descent pass another input than the ascent pass, whose prefix it "
                    "shares; move, convert or draw the input before `step`, not in the loss function"
                )
            return module(hidden, start=self._cut)

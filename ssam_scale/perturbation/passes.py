"""How one optimizer step runs its two passes over micro-batches, with or without a shared prefix."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

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

    With a `fraction` below 1 the ascent sees the first samples of each micro-batch. A prefix that is shared runs on all
    of them, and the ascent goes on from the first rows of its output.

    Args:
        sharding: what to run.
        cut: index of the first perturbed block.
        loss_fn: mean loss of a batch, given the forward to use.
        batches: the micro-batches of this process.
        scaler: scales the losses, if there is one.
        phases: who measures.
        fraction: share of each micro-batch's samples in the ascent, rounded down, at least one.
    """

    def __init__(
        self,
        sharding: Sharding,
        cut: int,
        loss_fn: LossFn,
        batches: Sequence[Any],
        scaler: torch.amp.GradScaler | None,
        phases: Phases,
        fraction: float = 1.0,
    ) -> None:
        self._sharding = sharding
        self._cut = cut
        self._loss_fn = loss_fn
        self._batches = batches
        self._scaler = scaler
        self._phases = phases
        self._fraction = fraction
        self._wholes: dict[int, Tensor] = {}  # the tensors that the ascent sees the first rows of, by identity of those
        self._prefix: tuple[Any, Tensor] | None = None

    def ascend(self) -> Tensor:
        """Forward and backward at w over all micro-batches; gradients are left reduced. Returns the mean loss."""
        return self._run(self._ascent_forward, "ascent backward", self._first_samples)

    def descend(self, *, statistics: bool) -> Tensor:
        """Forward and backward at the weights as they are, with the gradient of every parameter; returns the mean loss.

        Args:
            statistics: whether this pass is the one that updates BatchNorm's running statistics.
        """
        if statistics:
            return self._run(self._descent_forward, "descent backward")
        with frozen_statistics(self._sharding.network):
            return self._run(self._descent_forward, "descent backward")

    def _first_samples(self, batch: Any) -> Any:
        """What the ascent sees of a micro-batch."""
        if self._fraction == 1.0:
            return batch
        self._wholes = {}
        return tree_map_only(Tensor, self._first_rows, batch)

    def _first_rows(self, leaf: Tensor) -> Tensor:
        if not leaf.ndim:
            return leaf
        rows = leaf[: max(1, int(len(leaf) * self._fraction))]
        self._wholes[id(rows)] = leaf
        return rows

    def _run(self, forward: Forward, backward_phase: Phase, seen: Callable[[Any], Any] = lambda batch: batch) -> Tensor:
        losses = []
        for index, batch in enumerate(self._batches):
            with self._sharding.micro_batch(last=index == len(self._batches) - 1):
                loss = self._loss_fn(forward, seen(batch)) / len(self._batches)
                with self._phases(backward_phase):
                    self._sharding.backward(loss if self._scaler is None else self._scaler.scale(loss))
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    def _ascent_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        module = self._sharding.ascent_module
        if self._cut == 0:
            with self._phases("ascent forward"):
                return module(x, *args, **kwargs)
        shared = len(self._batches) == 1
        with self._phases("descent forward" if shared else "ascent forward"), torch.set_grad_enabled(shared):
            whole = self._wholes.get(id(x), x) if shared else x
            hidden = module(whole, stop=self._cut)
        if shared:
            if self._prefix is not None:
                raise ValueError("the loss function called `forward` twice; with a cut, concatenate the inputs instead")
            self._prefix = (whole, hidden)
        with self._phases("ascent forward"):
            return module(hidden.detach()[: len(x)], start=self._cut)

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

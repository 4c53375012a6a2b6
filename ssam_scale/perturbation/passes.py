"""How one optimizer step runs its two passes over micro-batches, with or without a shared prefix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ssam_scale.sharding import Sharding

from .batchnorm import frozen_statistics
from .phases import Phase, Phases
from .rng import RandomState

Forward = Callable[..., Any]
LossFn = Callable[[Forward, Any], Tensor]


class Passes:
    """The ascent and the descent pass of one step, which draw the same random numbers (see `randomness`).

    With a cut above 0 and one micro-batch, the prefix before the cut runs once: its output is detached for the ascent
    and used with its graph in the descent. With several micro-batches the graphs of all prefixes would have to be kept,
    which is the memory that accumulation saves; then the ascent runs the prefix without a graph instead.

    With a `fraction` below 1 the ascent sees the first samples of each micro-batch. A prefix that is shared runs on all
    of them, and the ascent goes on from the first rows of its output; what drops something at random in a prefix that
    is not shared, or in the suffix, then drops something else in the two passes, of which one has fewer samples.

    Args:
        sharding: what to run.
        cut: index of the first perturbed block.
        loss_fn: mean loss of a batch, given the forward to use.
        batches: the micro-batches of this process.
        scaler: scales the losses, if there is one.
        phases: who measures.
        fraction: share of each micro-batch's samples in the ascent, rounded down, at least one.
        may_cut: whether another step may have a cut. Then a loss function that this would not suit is refused in every
            step, and not in the first one that happens to have a cut.

    Attributes:
        cut: as it was given.
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
        *,
        may_cut: bool = False,
    ) -> None:
        self._sharding = sharding
        self.cut = cut
        self._loss_fn = loss_fn
        self._batches = batches
        self._scaler = scaler
        self._phases = phases
        self._fraction = fraction
        self._may_share = may_cut and len(batches) == 1
        self._device = next(sharding.network.parameters()).device
        self._random: list[RandomState] = []  # at the start of each micro-batch of the ascent
        self._wholes: dict[int, Tensor] = {}  # the tensors that the ascent sees the first rows of, by identity of those
        self._seen: Tensor | None = None  # the input of the one forward of an ascent that may share its prefix
        self._prefix: tuple[Tensor, RandomState] | None = None  # its output, and where the suffix began to draw

    def ascend(self) -> Tensor:
        """Forward and backward at w over all micro-batches; gradients are left reduced. Returns the mean loss."""
        losses = []
        for index, batch in enumerate(self._batches):
            self._random.append(RandomState.now(self._device))
            losses.append(self._run(index, self._ascent_forward, self._first_samples(batch), "ascent backward"))
        return torch.stack(losses).sum()

    def descend(self, *, statistics: bool) -> Tensor:
        """Forward and backward at the weights as they are, with the gradient of every parameter; returns the mean loss.

        Args:
            statistics: whether this pass is the one that updates BatchNorm's running statistics.
        """
        losses = []
        with nullcontext() if statistics else frozen_statistics(self._sharding.network):
            for index, batch in enumerate(self._batches):
                if self._random:
                    self._random[index].restore()
                losses.append(self._run(index, self._descent_forward, batch, "descent backward"))
        return torch.stack(losses).sum()

    def _run(self, index: int, forward: Forward, batch: Any, backward_phase: Phase) -> Tensor:
        with self._sharding.micro_batch(last=index == len(self._batches) - 1):
            loss = self._loss_fn(forward, batch) / len(self._batches)
            with self._phases(backward_phase):
                self._sharding.backward(loss if self._scaler is None else self._scaler.scale(loss))
        return loss.detach()

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

    def _ascent_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        module, whole = self._sharding.ascent_module, self._wholes.get(id(x), x)
        if self._may_share:
            if self._seen is not None:
                raise ValueError(
                    "the loss function called `forward` twice; with a mask that may have a cut, concatenate the inputs "
                    "instead, or switch the lever share_prefix off"
                )
            self._seen = whole
        if self.cut == 0:
            with self._phases("ascent forward"):
                return module(x, *args, **kwargs)
        shared = self._may_share
        with self._phases("descent forward" if shared else "ascent forward"), torch.set_grad_enabled(shared):
            hidden = module(whole if shared else x, stop=self.cut)
        if shared:
            self._prefix = hidden, RandomState.now(self._device)
        with self._phases("ascent forward"):
            return module(hidden.detach()[: len(x)], start=self.cut)

    def _descent_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._seen is not None and self._seen is not x:
            raise ValueError(
                "the loss function gave the descent pass another input than the ascent pass, whose prefix it shares "
                "where the mask has a cut; move, convert or draw the input before `step`, not in the loss function, or "
                "switch the lever share_prefix off"
            )
        module = self._sharding.descent_module
        with self._phases("descent forward"):
            if self._prefix is None:
                return module(x, *args, **kwargs)
            hidden, random = self._prefix
            random.restore()
            return module(hidden, start=self.cut)

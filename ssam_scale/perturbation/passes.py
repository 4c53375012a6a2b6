"""The two passes of a step: forward and backward over micro-batches, with or without a shared prefix."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ssam_scale.sharding import AscentReduction, ShardedPasses

from . import samples
from .arguments import CALLS_BACKWARD, check_loss, check_samples_first, explained
from .batchnorm import Statistics, evaluation_mode
from .graphs import AscentGraphs
from .loss import Forward, LossFn
from .mask_state import MaskState
from .parameters import TrainedParameters
from .phases import Phase, Phases
from .resolved_step import ResolvedStep
from .rng import RandomState
from .row_draws import RowDraws
from .samples import SampleRows, losses_of_each
from .skip_gradients import only_rows, without_gradient


class Passes:
    """The ascent and the descent pass of one step, which draw the same random numbers (see `rng`).

    A shared prefix runs once: its output is detached for the ascent and used with its graph in the descent. Where it is
    not shared, the ascent runs the blocks before the cut without a graph.

    With a `fraction` below 1 the ascent sees some samples of each micro-batch. A shared prefix runs on all of them, and
    the ascent goes on from their rows of its output; what drops something by torch's generator in a prefix that is
    not shared, or in the suffix, then drops something else in the two passes, of which one has fewer samples. So does
    what drops something in a descent by some of the samples, which the ascent has helped to choose. Layers that draw by
    row drop the same of each sample all the same.

    Args:
        sharding: what to run.
        parameters: that are trained.
        mask: the mask at work.
        resolved: what the step does.
        loss_fn: mean loss of a batch, given the forward to use.
        batches: the micro-batches of this process.
        scaler: scales the losses, if there is one.
        phases: times the parts.
        statistics: what the forwards write to buffers.
        of_samples: cuts and shapes of what a prefix puts out, whose first dimension is known to count samples; gets
            those that are looked at here.
        graphs: of small ascents.
        draws: tells layers which samples the next forward sees.
        part: which of the step's micro-batches these are, where each climbs and descends by itself, and of how many.
    """

    def __init__(
        self,
        sharding: ShardedPasses,
        parameters: TrainedParameters,
        mask: MaskState,
        resolved: ResolvedStep,
        loss_fn: LossFn,
        batches: Sequence[Any],
        scaler: torch.amp.GradScaler | None,
        phases: Phases,
        statistics: Statistics,
        of_samples: set[tuple[int, torch.Size]],
        graphs: AscentGraphs,
        draws: RowDraws,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        self._of_samples, self._graphs, self._draws = of_samples, graphs, draws
        self._number, self._of = part if len(batches) == 1 else (0, len(batches))
        self._statistics = statistics
        self._sharding, self._parameters, self._mask = sharding, parameters, mask
        self._resolved = resolved
        self._loss_fn = loss_fn
        self._batches = batches
        self._scaler = scaler
        self._phases = phases
        self._device = parameters.device
        self._random: list[RandomState] = []  # at the start of each micro-batch of the ascent
        self._index = 0  # of the micro-batch that is running
        self._rows = SampleRows(slice(None))  # of a micro-batch, which the ascent sees
        self._losses_at_w: list[Tensor] = []  # of each sample of each micro-batch, where something is chosen by them
        self._outputs: list[Any] | None = None  # of the model in the pass that is running, where they are asked for
        self._ascent_input: Tensor | None = None  # the input of the one forward of an ascent that may share its prefix
        self._prefix: tuple[Tensor, RandomState] | None = None  # its output, and where the suffix began to draw

    def ascend(self) -> Tensor:
        """Forward and backward at w over all micro-batches; leaves reduced gradients, as `resolved` says which.

        Returns:
            The mean loss of what this process's ascent saw, detached, of shape ().
        """
        every, resolved = self._parameters.by_name, self._resolved
        losses = []
        # Another optimizer's weights get the gradient of the descent only, as from a step without SAM.
        foreign = [p for p, stage in self._parameters.foreign if stage >= resolved.cut]
        with (
            without_gradient([*(every[name] for name in resolved.elided), *foreign]),
            only_rows(self._parameters.layers, resolved.rows),
            self._reducing(),
            self._draws.telling(),
        ):
            for index, batch in enumerate(self._batches):
                self._random.append(RandomState.now(self._device))
                self._tell(index)
                seen = self._ascents_samples(index, batch)
                self._tell(index, self._rows)
                if resolved.fraction == 1.0 and resolved.compares_losses:
                    self._outputs = []
                losses.append(self._run(index, self._ascent_forward, seen, "ascent backward", ascent=True))
                if self._outputs is not None:
                    random, outputs, self._outputs = RandomState.now(self._device), self._outputs, None
                    self._losses_at_w.append(losses_of_each(self._loss_fn, batch, outputs, self._asks_for_losses()))
                    random.restore()  # the loss function may draw, too
        return _sum(losses)

    def _reducing(self) -> AbstractContextManager[None]:
        """Surrounds the ascent: which of its gradients the processes reduce, and what stays gathered."""
        every, resolved = self._parameters.by_name, self._resolved
        return self._sharding.ascent(
            AscentReduction(
                [every[name] for name in resolved.reduced],
                list(resolved.reduced.values()),
                self._mask.full_subsets(resolved.plan, resolved.reduced),
                [p for name, p in every.items() if name in resolved.kept],
                resolved.within_shard_group,
            )
        )

    def plain(self) -> Tensor:
        """Forward and backward at w as a descent runs them, before which nothing has run; returns the mean loss."""
        losses = []
        with self._draws.telling():
            for index, batch in enumerate(self._batches):
                self._random.append(RandomState.now(self._device))
                self._tell(index)
                losses.append(self._run(index, self._descent_forward, batch, "descent backward"))
        return _sum(losses)

    def descend(self) -> Tensor:
        """Forward and backward at the weights as they are, with the gradient of every parameter; returns the mean loss.

        It updates BatchNorm's running statistics where nothing at w has.
        """
        losses = []
        with (
            nullcontext() if self._resolved.counted == "descent" else self._statistics.frozen(),
            self._draws.telling(),
        ):
            for index, batch in enumerate(self._batches):
                self._tell(index)
                seen = self._descents_samples(index, batch)
                if self._random:
                    self._random[index].restore()
                losses.append(self._run(index, self._descent_forward, seen, "descent backward"))
        return _sum(losses)

    def _run(self, index: int, forward: Forward, batch: Any, backward_phase: Phase, *, ascent: bool = False) -> Tensor:
        last = index == len(self._batches) - 1
        if not ascent and self._resolved.by_micro_batch and self._sharding.accumulates_in_grad:
            last &= self._number == self._of - 1  # else the gradients would lie where the next ascent's are to be
        with self._sharding.micro_batch(last=last):
            loss = self._loss(forward, batch)
            if self._of > 1:
                loss = loss / self._of
            with self._phases(backward_phase):
                try:
                    self._sharding.backward(loss if self._scaler is None else self._scaler.scale(loss))
                except RuntimeError as error:
                    if (better := explained(error)) is not None:
                        raise better from error
                    raise
        return loss.detach()

    def _loss(self, forward: Forward, batch: Any) -> Tensor:
        """What the loss function returns, if it has left the graph and the gradients to this."""
        before = self._last_gradient()
        try:
            loss = check_loss(self._loss_fn(forward, batch))
        except RuntimeError as error:
            if (better := explained(error)) is not None:
                raise better from error
            raise
        if before != self._last_gradient():
            raise ValueError(CALLS_BACKWARD)
        return loss

    def _last_gradient(self) -> tuple[int, int]:
        """What changes with the gradient of the last parameter, which every backward has."""
        last = next(reversed(self._parameters.by_name.values()), None)
        gradient = None if last is None else last.grad
        return id(gradient), 0 if gradient is None else gradient._version

    def _ascents_samples(self, index: int, batch: Any) -> Any:
        """What the ascent sees of a micro-batch."""
        resolved = self._resolved
        if resolved.fraction == 1.0:
            return batch
        check_samples_first(batch)
        if resolved.scores_samples:
            with (
                self._phases("ascent forward"),
                nullcontext() if resolved.counted == "choice" else self._statistics.frozen_at_first(),
            ):
                self._losses_at_w.append(self._losses(index, batch))
        if resolved.choose == "random":
            self._rows = self._random_rows(index, batch, resolved.fraction)
        elif resolved.choose == "highest_loss":
            self._rows = samples.highest(self._losses_at_w[-1], resolved.fraction)
        else:
            self._rows = samples.first(samples.number_of(batch), resolved.fraction)
        return self._rows.of(batch)

    def _descents_samples(self, index: int, batch: Any) -> Any:
        """What the descent sees of a micro-batch."""
        chosen = self._resolved.descent
        if chosen is None:
            return batch
        check_samples_first(batch)
        if chosen.choose == "random":
            rows = self._random_rows(index, batch, chosen.fraction)
        else:
            scores = self._losses_at_w[index]
            if chosen.choose == "sharpest":
                self._random[index].restore()
                with self._phases("descent forward"):
                    scores = self._losses(index, batch) - scores
            rows = samples.highest(scores, chosen.fraction)
        self._tell(index, rows)
        return rows.of(batch)

    def _tell(self, index: int, rows: SampleRows | None = None) -> None:
        """Layers that draw by row go by these samples of a micro-batch from here on; None: by all."""
        self._index = index
        if self._draws and (images := samples.number_of(self._batches[index])):
            before = self._number * images + sum(samples.number_of(batch) for batch in self._batches[:index])
            self._draws.tell(self._resolved.step, before, images, slice(None) if rows is None else rows.chosen)

    def _random_rows(self, index: int, batch: Any, fraction: float) -> SampleRows:
        stream = self._resolved.step * self._of + self._number + index
        rank = self._sharding.data_parallel_group.rank
        return samples.random(samples.number_of(batch), fraction, stream, rank, self._device)

    def _asks_for_losses(self) -> str:
        """The option, in words."""
        descent = self._resolved.descent
        if descent is None or self._resolved.choose == "highest_loss":
            return "direction choose='highest_loss'"
        return f"descent choose={descent.choose!r}"

    @torch.no_grad()
    def _losses(self, index: int, batch: Any) -> Tensor:
        """The loss of every sample of a micro-batch at the weights as they are, by a forward without a graph."""
        module, outputs = self._sharding.ascent_module, []

        def forward(*args: Any, **kwargs: Any) -> Any:
            outputs.append(module(*args, **kwargs))
            return outputs[-1]

        self._loss_fn(forward, batch)
        each = losses_of_each(self._loss_fn, batch, outputs, self._asks_for_losses())
        self._random[index].restore()  # the loss function may draw, too
        return each

    def _ascent_forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self._forward_of_ascent(*args, **kwargs)
        if self._outputs is not None:
            self._outputs.append(tree_map_only(Tensor, Tensor.detach, output))
        return output

    def _forward_of_ascent(self, *args: Any, **kwargs: Any) -> Any:
        module, cut, shared = self._sharding.ascent_module, self._resolved.cut, self._resolved.shares_prefix
        if not self._resolved.may_share_prefix and cut == 0:
            with self._phases("ascent forward"), self._ascents_statistics():
                if self._resolved.graphed and len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
                    return self._graphs(args[0])
                return module(*args, **kwargs)
        x = _only_input(args, kwargs)
        if x.is_leaf and x.requires_grad:
            raise ValueError(
                "the loss function's input requires a gradient of its own, which an ascent behind a cut does not "
                "compute: use a mask without a cut for gradient penalties"
            )
        whole = self._rows.full_of.get(id(x), x)
        if self._resolved.may_share_prefix:
            if self._ascent_input is not None:
                raise ValueError(
                    "the loss function called `forward` twice; with a mask that may have a cut, concatenate the inputs "
                    "instead, or switch savings.share_prefix off"
                )
            self._ascent_input = whole
        if cut == 0:
            with self._phases("ascent forward"), self._ascents_statistics():
                return self._graphs(x) if self._resolved.graphed else module(x)
        if shared:
            self._tell(self._index)
            with self._phases("descent forward"), torch.enable_grad():
                hidden = module(whole, stop=cut)
            self._prefix = hidden, RandomState.now(self._device)
            self._tell(self._index, self._rows)
        else:
            with self._phases("ascent forward"), torch.no_grad(), self._ascents_statistics():
                hidden = module(x, stop=cut)
        with self._phases("ascent forward"), self._ascents_statistics():
            part = self._ascents_part(hidden.detach(), x, whole)
            return self._graphs(part, start=cut) if self._resolved.graphed else module(part, start=cut)

    def _ascents_statistics(self) -> AbstractContextManager[None]:
        """Surrounds what another forward runs before or again, and may count."""
        counted = self._resolved.counted
        if counted == "ascent":
            return nullcontext()
        return self._statistics.frozen_at_first() if counted == "descent" else self._statistics.frozen()

    def _ascents_part(self, hidden: Tensor, x: Tensor, whole: Tensor) -> Tensor:
        """Of what a shared prefix put out for all samples, what belongs to the first ones."""
        if not self._resolved.shares_prefix or x is whole:
            return hidden
        if len(hidden) != len(whole):
            raise ValueError(
                f"with a fraction below 1 a shared prefix has to put out one row a sample, and for {len(whole)} "
                f"samples it put out a tensor of shape {tuple(hidden.shape)}; switch savings.share_prefix off"
            )
        # Where another dimension is as long as well, the first one may not be that of samples.
        known = (self._resolved.cut, hidden.shape)
        if len(whole) in hidden.shape[1:] and known not in self._of_samples:
            random = RandomState.now(self._device)
            with torch.no_grad(), evaluation_mode(self._sharding.network):
                alone = self._sharding.ascent_module(x, stop=self._resolved.cut)
            random.restore()
            if len(alone) != len(x):
                raise ValueError(
                    f"with a fraction below 1 a shared prefix has to put out samples first, and for {len(x)} samples "
                    f"it puts out a tensor of shape {tuple(alone.shape)}; switch savings.share_prefix off"
                )
            self._of_samples.add(known)
        return hidden[self._rows.chosen]

    def _descent_forward(self, *args: Any, **kwargs: Any) -> Any:
        module = self._sharding.descent_module
        if self._ascent_input is not None and self._ascent_input is not _only_input(args, kwargs):
            raise ValueError(
                "the loss function gave the descent pass another input than the ascent pass, whose prefix it shares "
                "where the mask has a cut; move, convert or draw the input before `step`, not in the loss function, or "
                "switch savings.share_prefix off"
            )
        with self._phases("descent forward"):
            if self._prefix is None:
                return module(*args, **kwargs)
            hidden, random = self._prefix
            random.restore()
            return module(hidden, start=self._resolved.cut)


def _sum(losses: list[Tensor]) -> Tensor:
    # Not the tensor itself: a captured graph writes to it again in the next pass.
    return torch.stack(losses).sum() if len(losses) > 1 else losses[0].clone()


def _only_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What a model in stages is called with, of which stages see nothing but what the one before put out."""
    given = [*args, *kwargs.values()]
    if len(given) != 1 or not isinstance(given[0], Tensor):
        kinds = ", ".join([*(type(a).__name__ for a in args), *(f"{k}={type(v).__name__}" for k, v in kwargs.items())])
        raise ValueError(
            f"the loss function called forward({kinds}); a model that a mask cuts is in stages, which take one tensor"
        )
    return given[0]

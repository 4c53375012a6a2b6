"""MESA: the outputs stay near those of averaged weights (arXiv 2205.14083)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ssam_scale.checks import check_number
from ssam_scale.config.trajectory_sections import MESATrajectory
from ssam_scale.perturbation.batchnorm import evaluation_mode

from .interface import TRAJECTORIES, Average, Reference, TrainingRun, check_term, trajectory_loss


class MESA:
    """Adds λ τ² KL(softmax(f(v, x)/τ) ‖ softmax(f(w, x)/τ)) to the loss, v being the average of w over the steps.

        average = EMA(model, 0.9995, opt.sharding)  # of ssam_scale.models.ema
        mesa = MESA(model, average)

        def loss_fn(forward, batch):
            images, labels, *reference = batch
            logits = forward(images)
            loss = F.cross_entropy(logits, labels)
            return loss + mesa.loss(logits, *reference) if reference else loss

        for epoch in range(90):
            mesa.begin_epoch(epoch)
            for batch in loader:
                opt.step(loss_fn, *mesa.attach([batch]))
                mesa.after_step()

    The model computes the reference itself, with the averaged weights in the place of its own and in evaluation mode
    (as the authors' code does): a forward without a graph before each step, and as much memory as the weights
    take, sharded as they are. Both passes of a step with a perturbation are held against the same reference, which
    is of the same images, mixed and cropped as they are.

    Args:
        module: the distributed model.
        average: of its weights; moved after each step.
        weight: λ, 0.8 in the authors' script for ImageNet.
        temperature: τ.
        start_epoch: epochs of training before the term is at work. The authors' code, which counts from 0 and compares
            by >, begins one epoch later with the same number.
        forward: images to logits, by `module`; None: `module` itself.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: one is out of its range.
    """

    def __init__(
        self,
        module: nn.Module,
        average: Average,
        *,
        weight: float = 0.8,
        temperature: float = 5.0,
        start_epoch: int = 5,
        forward: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        check_term(weight, temperature)
        check_number("start_epoch", start_epoch, "at least 0", lambda epoch: epoch >= 0, whole=True)
        self.average = average
        self._module, self._forward = module, forward if forward is not None else module
        self._weight, self._temperature, self._start = weight, temperature, start_epoch
        self._epoch = 0

    def begin_epoch(self, epoch: int, step: int = 0) -> None:
        """See `Trajectory`."""
        self._epoch = epoch

    @torch.no_grad()
    def attach(self, batches: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        """See `Trajectory`; runs the model."""
        if self._epoch < self._start:
            return list(batches)
        with self.average.swapped_in(), evaluation_mode(self._module):
            references = [Reference(self._forward(images).float()) for images, *_ in batches]
        pairs = zip(batches, references, strict=True)
        return [(images, targets, reference) for (images, targets, *_), reference in pairs]

    def loss(self, logits: Tensor, reference: Reference) -> Tensor:
        """See `Trajectory`."""
        return self._weight * trajectory_loss(logits, reference, self._temperature)

    def after_step(self) -> None:
        """Moves the average."""
        self.average.update()

    def leave_out_step(self) -> None:
        """See `Trajectory`."""

    def end_epoch(self) -> None:
        """See `Trajectory`."""

    def state_dict(self) -> dict[str, Any]:
        """The average, in full tensors by name. Collective."""
        return {"average": self.average.state_dict()}

    def sharded_state_dict(self) -> dict[str, Any]:
        """What `state_dict` returns, before it is gathered. Not collective."""
        return {"average": self.average.sharded_state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned, under any backend and number of processes."""
        self.average.load_state_dict(state_dict["average"])


@TRAJECTORIES.register("mesa", "the outputs of averaged weights (MESA)", "arXiv 2205.14083")
def build(section: MESATrajectory, run: TrainingRun) -> MESA:
    """The term of the section `trajectory`."""
    return MESA(
        run.module,
        run.average(section.decay),
        weight=section.weight,
        temperature=section.temperature,
        start_epoch=section.start_epoch,
        forward=run.forward,
    )

"""A loss term by outputs of earlier weights: the trajectory loss of arXiv 2205.14083, and who calls what when."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssam_scale.checks import check_number
from ssam_scale.config.trajectory_sections import Trajectory as TrajectorySection
from ssam_scale.registry import Registry
from ssam_scale.sharding import World
from ssam_scale.sharding.chunks import Chunk


class Reference(NamedTuple):
    """What the outputs of a micro-batch are held against: the last part of its batch, so that it goes where samples go.

    All have one row a sample, so that an ascent by a part of the batch takes that part of them.

    Attributes:
        logits: of earlier weights, float32 [N, classes]; None: the term is not yet at work.
        known: float32 [N], 0 for samples that nothing is known of; None: all are known.
        indices: int64 [N] on the CPU, which images these are; None where nobody has to know.
    """

    logits: Tensor | None
    known: Tensor | None = None
    indices: Tensor | None = None


def trajectory_loss(logits: Tensor, reference: Reference, temperature: float) -> Tensor:
    """Mean over a batch of τ² KL(softmax(z'/τ) ‖ softmax(z/τ)), z' being the reference: float32 of shape ().

    The gradient flows through z alone. Divergence and direction are those of arXiv 2205.14083; the factor τ², which
    keeps the gradient's size whatever τ is, is that of the authors' code, to which their weights belong. A sample that
    nothing is known of counts as one without divergence.

    Args:
        logits: z, [N, classes].
        reference: z', and which of it is known.
        temperature: τ.
    """
    if reference.logits is None:
        return logits.new_zeros((), dtype=torch.float32)
    now = F.log_softmax(logits.float() / temperature, dim=-1)
    then = F.log_softmax(reference.logits / temperature, dim=-1)
    divergence = (then.exp() * (then - now)).sum(-1)  # not `kl_div`, which torch.vmap runs sample by sample
    if reference.known is not None:
        divergence = divergence * reference.known
    return temperature**2 * divergence.mean()


def check_term(weight: float, temperature: float) -> None:
    """Refuse a weight λ or a temperature τ that is none.

    Raises:
        TypeError, ValueError: one is of another kind, or not above 0.
    """
    check_number("weight", weight, "a number above 0", lambda value: value > 0.0)
    check_number("temperature", temperature, "a number above 0", lambda value: value > 0.0)


class Average(Protocol):
    """Averaged weights of a network, wherever they live: `ssam_scale.models.ema.EMA` is one."""

    @property
    def buffers(self) -> dict[str, Tensor]:
        """The averages of floating-point buffers by name, which this process has its own of."""

    def update(self, step: int | None = None) -> None:
        """Move towards the weights as they are."""

    def swapped_in(self) -> AbstractContextManager[None]:
        """The network computes with the average inside."""

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by name. Collective."""

    def sharded_state_dict(self) -> dict[str, Tensor | Chunk]:
        """What `state_dict` returns, before it is gathered."""

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Take back what `state_dict` returned."""


class Trajectory(Protocol):
    """A loss term by outputs of earlier weights, and what it remembers of them. A training loop calls

        term.begin_epoch(epoch)
        for each step:
            batches = term.attach(batches)      # before the step, with all of its micro-batches
            ...                                 # the step, whose loss adds term.loss(logits, reference)
            term.after_step()
        term.end_epoch()

    All but `loss` are collective where weights or images are shared out.
    """

    def begin_epoch(self, epoch: int, step: int = 0) -> None:
        """`epoch` epochs are done, and `step` steps of the one that goes on."""

    def attach(self, batches: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        """The micro-batches of a step with their references: (images, targets, Reference).

        Those that have none yet are (images, targets). Can be called again with the same ones.

        Args:
            batches: (images, targets), or (images, targets, indices).
        """

    def loss(self, logits: Tensor, reference: Reference) -> Tensor:
        """What is to be added to the loss of a micro-batch, or of some of its samples: float32 of shape ()."""

    def after_step(self) -> None:
        """The step with the batches that were attached last has been made."""

    def leave_out_step(self) -> None:
        """The same, and it was left out: the weights are what they were."""

    def end_epoch(self) -> None:
        """The epoch's last step has been made."""

    def state_dict(self) -> dict[str, Any]:
        """What must be known to go on from here. Collective."""

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned. Collective."""


@dataclass(frozen=True)
class TrainingRun:
    """What a term is told of the run that it is for.

    Attributes:
        world: the processes.
        module: the distributed model.
        forward: images to logits, in the run's precision.
        average: makes averaged weights of a decay per step.
        classes: of the model.
        folder: for what is kept on disk, the run's own.
        elsewhere: other folders in which a run that is gone on with may have kept it.
        checkpoints: how many are kept that can be gone back to.
    """

    world: World
    module: nn.Module
    forward: Callable[[Tensor], Tensor]
    average: Callable[[float], Average]
    classes: int
    folder: Path
    elsewhere: Sequence[Path] = ()
    checkpoints: int = 1


TRAJECTORIES: Registry[Callable[[Any, TrainingRun], Trajectory]] = Registry("ssam_scale.methods")
"""By the `kind` of the section `trajectory`: from the section and the run to the term."""


def build_trajectory(section: TrajectorySection, run: TrainingRun) -> Trajectory:
    """The term of the section `trajectory`."""
    return TRAJECTORIES[section.kind].value(section, run)

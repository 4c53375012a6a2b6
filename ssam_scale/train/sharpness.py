"""How sharp a minimum is, measured of a run: beside its evaluations, and with the loss and the images of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ssam_scale.config.schema import Config
from ssam_scale.data import sample_loader
from ssam_scale.data.workers import Workers
from ssam_scale.errors import NotFiniteError, UserError
from ssam_scale.models import build_network, freeze, most_trained
from ssam_scale.sharding import World
from ssam_scale.sharpness import MeanLoss, Measures, measure
from ssam_scale.tracking.meters import forget_peak
from ssam_scale.tracking.run import Run

from .agreement import Agreement, Asked
from .checkpoint import ModelState
from .criterion import Criterion
from .evaluation import EvaluationInterrupted
from .hooks import Hook
from .memory import is_out_of_memory
from .progress import Progress, ProgressBar

if TYPE_CHECKING:
    from .build import Components

Batches = Sequence[tuple[Tensor, Tensor]]
"""Images and labels, in the host's memory."""


def fixed_batches(
    config: Config, world: World, place: Path, images: int, micro_batch: int, workers: Workers | None = None
) -> Batches:
    """This process's images and labels of a fixed choice, as an evaluation sees them: see `data.sample_loader`.

    Raises:
        UserError: the images cannot be read, or are of other classes.
    """
    loader = sample_loader(
        config.data,
        place,
        images,
        rank=world.rank,
        world_size=world.size,
        device=torch.device("cpu"),
        batch=micro_batch,
        num_classes=config.model.num_classes,
        workers=workers,
    )
    return [(batch.images, batch.labels) for batch in loader]


def mean_loss(
    config: Config, network: nn.Module, batches: Batches, world: World, asked: Callable[[], object] = lambda: None
) -> MeanLoss:
    """The loss that a run trains by (`loss`), of its network in float32 over fixed images, without what augments them.

    Labels are not mixed, and terms of a trajectory are left out. What the run's last epoch does not train
    (`model.freeze`) is constant.

    Args:
        config: of the run.
        network: on the CPU; it is moved to the device.
        batches: of this process.
        world: the processes.
        asked: see `MeanLoss`.
    """
    freeze(network, config.model.freeze, most_trained(config.model.freeze))
    return MeanLoss(network.to(world.device), batches, Criterion(config.loss), world, asked)


def check_differentiable(config: Config, device: torch.device) -> None:
    """Find out on a blank image, and not after an epoch, whether what `config.sharpness` wants can be computed.

    Raises:
        UserError: it wants second derivatives of a network that has none.
    """
    section, side = config.sharpness, config.data.eval_resolution
    if section is None or not (section.eigenvalues or section.probes):
        return
    blank = [(torch.zeros(1, 3, side, side), torch.zeros(1, dtype=torch.int64))]
    loss = mean_loss(config, build_network(config), blank, World(device=device))
    try:
        loss.hessian_product(torch.zeros(loss.vectors.size, device=device))
    except UserError as error:
        raise UserError(f"sharpness: {error}") from error


class MeasureSharpness(Hook):
    """Measures after epochs how sharp the minimum is: of the averaged weights if there are any, as evaluations are.

    Whatever shards them, the weights are gathered into a copy of the network on every process, which sees its share of
    the images: training's own network, its buffers, its hooks and its random numbers are left alone. That takes the
    memory of whole weights, a gradient and some vectors on each process, until it is done.

    Args:
        config: of the run, with a section `sharpness`.
        world: the processes.
        components: what is trained.
        run: where results are recorded.
        bar: shows them.
        agreement: what processes ask for.
    """

    doing = "measuring sharpness"

    def __init__(
        self, config: Config, world: World, components: Components, run: Run, bar: ProgressBar, agreement: Agreement
    ) -> None:
        assert config.sharpness is not None
        self._config, self._section, self._world, self._components = config, config.sharpness, world, components
        self._run, self._bar, self._agreement = run, bar, agreement
        self._batches: Batches | None = None
        # By the same vectors in every run, whatever its seed.
        self._measures = Measures(self._section.rho, self._section.eigenvalues, self._section.probes)

    def between_epochs(self, progress: Progress) -> None:
        """Collective."""
        # Where the evaluation was interrupted, it is made again when the run goes on, and this after it.
        if progress.unevaluated or (not progress.ended and progress.epoch % self._section.every_epochs):
            return
        try:
            self._measure(progress)
        except EvaluationInterrupted:
            progress.unevaluated = True
        except NotFiniteError as error:  # a training may come back from there
            self._bar.say(f"sharpness was not measured: {error}")
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(
                f"sharpness: {self._section.micro_batch} images of a pass do not fit beside training; lower "
                "sharpness.micro_batch, ask for fewer eigenvalues, or measure later: sharpness=null, and `ssam-scale "
                "sharpness CHECKPOINT`"
            ) from error

    def _measure(self, progress: Progress) -> None:
        config, components = self._config, self._components
        if self._batches is None:  # the same ones each time
            images, micro_batch = self._section.images, self._section.micro_batch
            self._batches = fixed_batches(
                config, self._world, config.data.train, images, micro_batch, components.train.workers
            )
        components.opt.sharding.reshard()  # after an evaluation FSDP2's root shows gathered weights as its parameters
        weights = ModelState(components.network, components.opt.sharding).state_dict()
        if components.ema is not None:
            weights |= components.ema.state_dict()
        loss = mean_loss(config, build_network(config, weights), self._batches, self._world, self._leave_if_asked)
        del weights
        found = measure(loss, self._measures)
        del loss
        forget_peak(self._world.device)  # what this took is none of training's
        self._run.log(found.metrics(), progress.step)
        curvature = "".join(f", eigenvalue {number} {value:.4g}" for number, value in enumerate(found.eigenvalues, 1))
        traced = "" if found.trace is None else f", trace {found.trace:.4g}"
        self._bar.say(
            f"{progress}: sharpness at radius {found.rho:g}: gap {found.gap:.4g}"
            f"{curvature}{traced} on {found.images} images"
        )

    def _leave_if_asked(self) -> None:
        self._world.whereabouts.at(self.doing)
        if self._agreement(Asked(end=self._run.signals.received is not None)).end:
            raise EvaluationInterrupted

"""Hooks: what the training loop calls around steps and epochs. `build.build_hooks` decides which ones a run has."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from statistics import fmean
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from ssam_scale.config.schema import Config
from ssam_scale.errors import NotFiniteError
from ssam_scale.methods import Average, Trajectory
from ssam_scale.models import average_statistics
from ssam_scale.models.ema import EMA
from ssam_scale.perturbation import SparseSAM, StepReport
from ssam_scale.sharding import World
from ssam_scale.tracking.meters import EnergyMeter, peak_bytes
from ssam_scale.tracking.ranks import Measured, Ranks
from ssam_scale.tracking.run import Run
from ssam_scale.tracking.timer import PhaseTimer

from .learning_rate import learning_rate

if TYPE_CHECKING:
    from ssam_scale.data import ImageLoader

    from .batches import EpochBatches
    from .build import Components
    from .progress import Progress, ProgressBar
    from .unrecorded import Unrecorded


_FEW = 20  # images are named in a line


class Hook:
    """Does nothing, at each place where the training loop calls its hooks.

    Every process calls the same hooks in the same order, so that a hook may be collective. What it needs beside the
    arguments (configuration, world, optimizer, tracked run) it is constructed with; what it must remember from one run
    to the next is a part of the checkpoint (`build.Components.state`). An exception in a hook ends the run.

    Attributes:
        doing: what a process is in while the hook is called, in the line that names it when others wait for it.
    """

    doing: ClassVar[str] = "a hook"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """What says nothing else is in itself, by its name."""
        super().__init_subclass__(**kwargs)
        if "doing" not in vars(cls):
            cls.doing = cls.__name__

    def before_step(self, progress: Progress, batches: EpochBatches) -> None:
        """Before the batches of a step are loaded: `progress.step` steps are done, `batches` can be looked ahead.

        Records are by `progress.step`; what changes over the run goes by `progress.place`.
        """

    def after_step(self, progress: Progress, report: StepReport) -> None:
        """After a step, which `progress.step` counts already."""

    def after_epoch(self, progress: Progress) -> None:
        """After the last step of an epoch, which `progress.epoch` counts already; or of the run, within one."""

    def between_epochs(self, progress: Progress) -> None:
        """After all that ends an epoch; what changes nothing of training, as an evaluation.

        Where a signal ends the run in the midst of it (`progress.unevaluated`), it is called again on resuming.
        """

    def on_end(self, error: BaseException | None) -> None:
        """Once, when training ends; `error` is what ended it early."""


@contextmanager
def ending(hooks: Sequence[Hook]) -> Iterator[None]:
    """Call `on_end` of every hook on the way out, in their order, whatever is raised inside or by one of them."""
    with ExitStack() as stack:
        for hook in reversed(hooks):
            stack.push(lambda kind, error, traceback, hook=hook: hook.on_end(error))
        yield


class UpdateEMA(Hook):
    """Moves the averaged weights after every step.

    Args:
        ema: of the network's weights.
    """

    def __init__(self, ema: EMA) -> None:
        self._ema = ema

    def after_step(self, progress: Progress, report: StepReport) -> None:
        """Counts as a part of the step's time: `LogMetrics` comes later. Not after a step that was left out."""
        if not report.left_out:
            self._ema.update(progress.step)


class ListDamaged(Hook):
    """Says after an epoch which images were found damaged in it, and records how many there are (`data/damaged`).

    Args:
        loader: of the training images; they are replaced by others (`data.on_damaged: skip`).
        world: the processes, each of which has met its own.
        run: what is recorded goes there.
        bar: what a person sees goes there.
    """

    def __init__(self, loader: ImageLoader, world: World, run: Run, bar: ProgressBar) -> None:
        self._loader, self._world, self._run, self._bar = loader, world, run, bar
        self._told: set[int] = set()

    def after_epoch(self, progress: Progress) -> None:
        """Collective."""
        every = {image for mine in self._world.each_says(sorted(self._loader.damaged)) for image in mine}
        if new := sorted(every - self._told):
            source = self._loader.source
            few = ", ".join(source.named(image) for image in new[:_FEW]) + (" and more" if len(new) > _FEW else "")
            images = "image" if len(new) == 1 else "images"
            self._bar.say(
                f"{len(new):,} damaged {images} of {source.place}, in the place of which the next ones were seen: {few}"
            )
            self._run.log({"data/damaged": float(len(every))}, progress.step)
        self._told = every


class RunTrajectory(Hook):
    """Tells a trajectory term of epochs and steps: before all that a checkpoint holds, and before any rehearsal.

    Args:
        trajectory: the term.
    """

    def __init__(self, trajectory: Trajectory) -> None:
        self._trajectory = trajectory
        self._begun = False

    def before_step(self, progress: Progress, batches: EpochBatches) -> None:
        """Begins the epoch with the first step that this process makes in it."""
        if not self._begun:
            self._trajectory.begin_epoch(progress.epoch, progress.step_of_epoch)
            self._begun = True

    def after_step(self, progress: Progress, report: StepReport) -> None:
        """Counts as a part of the step's time: `LogMetrics` comes later."""
        if report.left_out:
            self._trajectory.leave_out_step()
        else:
            self._trajectory.after_step()

    def after_epoch(self, progress: Progress) -> None:
        """Collective. Where the run ends within an epoch that is not at its end: a longer run goes on with it."""
        if progress.closed:
            return
        self._trajectory.end_epoch()
        self._begun = False


class AverageBatchNormStatistics(Hook):
    """Averages BatchNorm's running statistics over the processes at the end of an epoch; those of averages, too.

    Args:
        network: whose buffers they are.
        averages: of the network's weights and buffers.
        world: the processes.
    """

    def __init__(self, network: nn.Module, averages: Sequence[Average], world: World) -> None:
        self._network, self._averages, self._world = network, averages, world

    def after_epoch(self, progress: Progress) -> None:
        """Collective."""
        average_statistics(self._network, self._world)
        for average in self._averages:
            with average.swapped_in():
                average_statistics(self._network, self._world)


class LogEpochs(Hook):
    """Records how long each epoch took, from its first step on, refreshes included: the first hook of all.

    Args:
        run: where.
        unrecorded: knows what the epoch had taken before a resumed run went on with it.
        paused: seconds so far that are none of training.
    """

    def __init__(self, run: Run, unrecorded: Unrecorded, paused: Callable[[], float] = lambda: 0.0) -> None:
        self._run, self._unrecorded, self._paused = run, unrecorded, paused
        self._began: float | None = None

    def before_step(self, progress: Progress, batches: EpochBatches) -> None:
        """Takes the time."""
        if self._began is None:
            self._began = self._now() - self._unrecorded.seconds

    def after_step(self, progress: Progress, report: StepReport) -> None:
        """Takes the time that is saved with a checkpoint."""
        self._take()

    def after_epoch(self, progress: Progress) -> None:
        """Records it."""
        self._take()
        self._run.log_epoch(epoch=progress.epochs, seconds=self._unrecorded.seconds, step=progress.step)
        self._began, self._unrecorded.seconds = None, 0.0

    def _take(self) -> None:
        if self._began is not None:  # a run that is resumed behind an epoch's last step has none of its steps
            self._unrecorded.seconds = self._now() - self._began

    def _now(self) -> float:
        return time.monotonic() - self._paused()


class LogMetrics(Hook):
    """Records metrics of each window of steps: `tracking.log_every` of them, or what an epoch has left at its end.

    Losses are summed up on the device, so that no step waits for it but the last of a window.

    Args:
        config: of the run.
        world: the processes.
        components: what is trained.
        phases: times the steps; a step ends when this hook is called.
        run: where metrics are recorded.
        bar: shows the latest.
    """

    doing = "recording metrics"

    def __init__(
        self,
        config: Config,
        world: World,
        components: Components,
        phases: PhaseTimer,
        run: Run,
        bar: ProgressBar,
    ) -> None:
        self._config, self._world, self._components = config, world, components
        self._phases, self._run, self._bar = phases, run, bar
        gathers = config.sharding.backend in ("fsdp2", "zero3")
        self._ranks = Ranks(world.hosts(), gathers=gathers)
        self._energy = EnergyMeter(world.device)
        self._steps = 0  # of the window, in this process's life

    def before_step(self, progress: Progress, batches: EpochBatches) -> None:
        """Begins to count energy with the first step of a window, so that no evaluation is in it."""
        if not self._steps:
            self._energy.begin()
        self._steps += 1

    def after_step(self, progress: Progress, report: StepReport) -> None:
        """Collective in the last step of a window.

        Raises:
            NotFiniteError: the mean loss of a window is not finite, or too many steps in a row were left out.
        """
        self._phases.step(report.kind)
        assert report.loss is not None  # a step by batches knows it
        unrecorded = self._components.unrecorded
        if report.left_out:
            self._count_left_out(progress.step)
        else:
            unrecorded.left_out_in_a_row = 0
            unrecorded.losses.append(report.loss.detach())
            unrecorded.densities.append(report.density)
        if not progress.steps_left or progress.step % self._config.tracking.log_every == 0:
            self._record(progress.step, report)

    def _count_left_out(self, step: int) -> None:
        unrecorded, limit = self._components.unrecorded, self._config.train.max_skips
        unrecorded.left_out += 1
        unrecorded.left_out_in_a_row += 1
        self._bar.say(f"step {step} is left out: its loss or gradient is not finite")
        if unrecorded.left_out_in_a_row >= limit:
            raise NotFiniteError(
                f"{limit} steps in a row up to step {step} were left out, as their losses or gradients are not finite "
                "(train.max_skips); a lower optimizer.lr or perturbation.rho may help"
            )

    def on_end(self, error: BaseException | None) -> None:
        """Sums up the run once it is complete."""
        if error is None:
            self._run.finish_summary(straggler=self._ranks.straggler())

    def _record(self, step: int, report: StepReport) -> None:
        opt, images, unrecorded = self._components.opt, self._config.data.batch_size, self._components.unrecorded
        lr = learning_rate(opt)
        if self._config.train.on_nonfinite == "skip":
            self._run.log({"train/steps_left_out": unrecorded.left_out}, step)
        # The device is waited for here. Without a step that was made there is no loss.
        own = float(torch.stack(unrecorded.losses).mean()) if unrecorded.losses else math.nan
        times, peak = self._phases.drain(), peak_bytes(self._world.device)
        measured = [
            Measured.unpacked(row)
            for row in self._world.gather(Measured.of(times, own, peak, self._energy.joules()).packed())
        ]
        loss = fmean(m.loss for m in measured)
        if not unrecorded.losses:  # on all processes
            self._steps = 0
            return
        if not math.isfinite(loss):
            raise NotFiniteError(
                f"the loss became {loss} before step {step}; a lower optimizer.lr or perturbation.rho may help"
            )
        self._run.log(self._ranks.metrics(measured, images=images * self._steps, steps=self._steps), step)
        if (news := self._ranks.news()) is not None:
            self._bar.say(news)
        self._run.log_window(times, loss=loss, lr=lr, densities=unrecorded.densities, images_per_step=images, step=step)
        if self._config.perturbation is not None:
            self._run.log({"perturbation/rho": report.radius, "perturbation/skipped": opt.skipped}, step)
            kappa = float(report.kappa)
            if not math.isnan(kappa):  # not known, or the gradient was not finite
                self._run.log({"perturbation/kappa": kappa}, step)
        if opt.scaler is not None:
            self._run.log({"train/loss_scale": opt.scaler.get_scale()}, step)
        self._bar.show(f"loss {loss:.3f}, lr {lr:.2g}, {images / times.step:.0f} images/s")
        unrecorded.losses, unrecorded.densities, self._steps = [], [], 0


class LogFixedDensities(Hook):
    """Records, once, what a mask that never changes perturbs of each layer.

    Args:
        opt: with the mask.
        run: where.
    """

    def __init__(self, opt: SparseSAM, run: Run) -> None:
        self._opt, self._run = opt, run
        self._done = False

    def before_step(self, progress: Progress, batches: EpochBatches) -> None:
        """Before the first step."""
        if not self._done:
            layout = self._opt.parameters.layout
            self._run.log_layers(self._opt.plan.counts, layout.numels, step=0, steps="the same in every step")
            self._done = True


class LogDrawnDensities(Hook):
    """Records, for each epoch, what a mask that is drawn in every step perturbs of each layer on average.

    Args:
        opt: with the mask.
        unrecorded: sums up.
        run: where.
    """

    def __init__(self, opt: SparseSAM, unrecorded: Unrecorded, run: Run) -> None:
        self._opt, self._unrecorded, self._run = opt, unrecorded, run

    def after_step(self, progress: Progress, report: StepReport) -> None:
        """Adds the step to its epoch."""
        sums = self._unrecorded.counts
        self._unrecorded.counted += 1
        for name, count in report.plan.counts.items():
            sums[name] = sums.get(name, 0) + count

    def after_epoch(self, progress: Progress) -> None:
        """Records the means."""
        counted = self._unrecorded.counted
        if not counted:  # a run that is resumed behind an epoch's last step has recorded it
            return
        means = {name: total / counted for name, total in self._unrecorded.counts.items()}
        numels = self._opt.parameters.layout.numels
        self._run.log_layers(means, numels, step=progress.step, steps="mean over the epoch that ends with step")
        self._unrecorded.counts, self._unrecorded.counted = {}, 0

"""From a configuration to the objects that a training loop needs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from traceback import walk_tb
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.stateful import Stateful

from ssam_scale.config.deepspeed import batch_problems, taken
from ssam_scale.config.mask_sections import BlockMask, DepthMask
from ssam_scale.config.micro_batches import MicroBatches, micro_batches
from ssam_scale.config.schema import Config, Perturbation
from ssam_scale.config.trajectory_sections import SAFTrajectory
from ssam_scale.data import ImageLoader, eval_loader, train_loader
from ssam_scale.data.mixing import Mixing
from ssam_scale.errors import UserError
from ssam_scale.masks import RunInfo, build_mask
from ssam_scale.methods import MESA, Average, TrainingRun, Trajectory, build_trajectory
from ssam_scale.methods.memory import check_room, check_shared
from ssam_scale.methods.saf import epochs_kept
from ssam_scale.models import (
    Loaded,
    build_model,
    check_compiler,
    check_stages,
    drop_by_row,
    freeze,
    load_pretrained,
    stages_of,
)
from ssam_scale.models.ema import EMA
from ssam_scale.perturbation import DescentSamples, Gate, Phases, Savings, SparseSAM
from ssam_scale.perturbation.batchnorm import batchnorms, frozen_statistics
from ssam_scale.perturbation.directions import build_direction
from ssam_scale.perturbation.loss import LossFn
from ssam_scale.perturbation.reference import first_samples
from ssam_scale.perturbation.schedules import build_schedule
from ssam_scale.sharding import ShardedWeights, World
from ssam_scale.sharding.device import PRECISIONS, has_bf16
from ssam_scale.sharding.place import place
from ssam_scale.tracking.run import Run
from ssam_scale.tracking.timer import PhaseTimer

from .agreement import Agreement
from .batches import MicroBatch
from .checkpoint import ModelState, OptimizerState, SaveCheckpoint, SparsePart
from .criterion import Criterion
from .early_stop import Patience
from .evaluation import Evaluate
from .hooks import (
    AverageBatchNormStatistics,
    Hook,
    ListDamaged,
    LogDrawnDensities,
    LogEpochs,
    LogFixedDensities,
    LogMetrics,
    RunTrajectory,
    UpdateEMA,
)
from .learning_rate import scheduler
from .length import Length
from .log_model import LogModel
from .memory import largest_micro_batch
from .optimizer import base_optimizer, check_direction, check_groups, check_handed, check_saved
from .probes import ProbeSaving
from .progress import Progress, ProgressBar
from .refresh import RefreshMask, refreshed_section
from .sharpness import MeasureSharpness, check_differentiable
from .traffic import LogTraffic
from .unrecorded import LocalBuffers, Unrecorded


@dataclass(frozen=True)
class Components:
    """Everything that is trained with, on this process.

    Attributes:
        module: the distributed model, what evaluation calls.
        network: the timm model inside, which names the parameters and is saved.
        opt: the optimizer.
        scheduler: of the learning rate, timm's; updated before every step.
        ema: averaged weights, if wanted.
        trajectory: a loss term by outputs of earlier weights, if wanted; `attach` is to be called before a step.
        loss_fn: what `opt.step` is given.
        train, val: the loaders.
        mix: mixup and CutMix on a batch, on its device; None: neither.
        split: how the images of a step are shared out.
        pretrained: what became of the weights that the run starts from; None: it starts from random ones, or goes on.
        precision: dtype of forward passes.
        progress: how far the run has come.
        unrecorded: what its hooks have summed up since their last records.
        state: what a checkpoint holds, by name: whatever is named here is saved and resumed.
    """

    module: nn.Module
    network: nn.Module
    opt: SparseSAM
    scheduler: Any
    ema: EMA | None
    trajectory: Trajectory | None
    loss_fn: LossFn
    train: ImageLoader
    val: ImageLoader
    mix: Mixing | None
    split: MicroBatches
    pretrained: Loaded | None
    precision: torch.dtype
    progress: Progress
    unrecorded: Unrecorded
    state: dict[str, Stateful]

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one epoch."""
        return self.progress.steps_per_epoch

    def attached(self, micro_batches: list[MicroBatch]) -> list[MicroBatch]:
        """The micro-batches of a step as `loss_fn` takes them: with what a trajectory term holds them against."""
        return micro_batches if self.trajectory is None else self.trajectory.attach(micro_batches)


def build(
    config: Config, world: World, phases: Phases, length: Length, found: int | None = None, *, epoch: int | None = None
) -> Components:
    """Build what the configuration describes; with the same weights on every process.

    Args:
        config: of the run.
        world: the processes.
        phases: times the steps.
        length: of the run.
        found: images of a micro-batch that a checkpoint says (`micro_batch_of`); None: `max_micro_batch: auto` is
            looked for, and without a limit a process takes its part whole.
        epoch: from 0, that the checkpoint is in which brings the weights, so that those of `model.pretrained` are not
            needed; None: there is none, and the run begins.

    Raises:
        UserError: what the configuration asks for cannot be had.
    """
    check_precision(config, world.device)
    if config.train.compile:
        check_compiler(world.device)
    if found is None:
        shared_out(config, world)  # what cannot be is said before anything is built
    check_direction(config, base_optimizer(config, nn.Linear(1, 1)))  # said before minutes of building
    check_handed(config, world)
    check_saved(config, world)
    _check_outputs(config, world, length)
    torch.manual_seed(config.train.seed)
    staged_model = build_model(config)
    given, pretrained = config.model.pretrained, None
    if given and epoch is None:
        pretrained = load_pretrained(staged_model.model, given if isinstance(given, Path) else None)
    freeze(staged_model.model, config.model.freeze, epoch or 0)
    check_groups(config, staged_model.model)
    staged_model.activation_checkpointing = config.train.activation_checkpointing
    mask = config.perturbation.mask if config.perturbation is not None else None
    if config.model.stages is None:
        if isinstance(mask, (DepthMask, BlockMask)):
            try:
                stages_of(staged_model.model)  # says which families can be cut
            except UserError as error:
                raise UserError(f"perturbation.mask.pattern {mask.pattern} on {config.model.name}: {error}") from error
        if config.train.activation_checkpointing:
            stages_of(staged_model.model, what="train.activation_checkpointing works")
    _try_forward(config, staged_model)
    check_differentiable(config, world.device)
    if config.model.stages is not None:
        try:
            check_stages(staged_model.model, staged_model.stages, (2, 3, *[config.data.resolution] * 2))
        except UserError as error:
            raise UserError(f"model.stages: {error}") from error
    # What a step drops is its images', and not a process's.
    drop_by_row(staged_model.model, config.train.seed, torch.zeros(1, 3, *[config.data.resolution] * 2))
    precision = PRECISIONS[config.train.precision]
    loss_fn = soft_loss(config, precision)  # the term is added where there is a module for it
    if config.train.max_micro_batch == "auto" and found is None:
        build_optimizer = partial(base_optimizer, config)
        found = largest_micro_batch(config, world, backend_of(config, world), staged_model, build_optimizer, loss_fn)
    split = shared_out(config, world, found)
    if config.train.compile:
        staged_model.compile()  # now: code for each size that is tried takes minutes, and less memory than none

    _try_micro_batch(config, staged_model, split)
    train, val = _loaders(config, world, split)
    network = staged_model.model
    try:
        module, base = place(
            staged_model,
            [s.block for s in staged_model.stages],
            backend_of(config, world),
            world,
            lambda: base_optimizer(config, network),
            replicas=config.sharding.replicas,
            batch_size=split.images,
            accumulation=split.accumulation,
            max_grad_norm=config.optimizer.clip_grad_norm,
            deepspeed=taken(config.sharding.deepspeed),
            precision=precision,
        )
    except ValueError as error:
        raise UserError(f"sharding: {error}") from error
    scaler = torch.amp.GradScaler(world.device.type) if config.train.precision == "fp16" else None
    progress = Progress(length, patience=Patience(config.train.early_stop))
    opt = _sparse_sam(config, module, base, scaler, length, phases)
    decay, warmup = config.train.ema_decay, config.train.ema_warmup
    ema = EMA(network, decay, opt.sharding, warmup=warmup) if decay is not None else None
    trajectory = _trajectory(config, world, module, network, opt.sharding, precision)
    state: dict[str, Stateful] = {
        "sparse": SparsePart(opt),  # the first to be loaded, because it refuses what was saved with another mask
        # Before the weights: an optimizer without a state is given one by a step, with a learning rate of 0.
        "optimizer": OptimizerState(network, opt),
        "model": ModelState(network, opt.sharding),
        "progress": progress,
        "unrecorded": (unrecorded := Unrecorded(world)),
    }
    if scaler is not None:
        state["scaler"] = scaler
    if ema is not None:
        state["ema"] = ema
    averages = _averages(ema, trajectory)
    if trajectory is not None:
        state["trajectory"] = trajectory
    state["buffers"] = LocalBuffers(network, averages, world, progress)  # after those of the model were loaded
    return Components(
        module=module,
        network=network,
        opt=opt,
        scheduler=scheduler(config, base, length),
        ema=ema,
        trajectory=trajectory,
        loss_fn=loss_fn if trajectory is None else soft_loss(config, precision, trajectory),
        train=train,
        val=val,
        pretrained=pretrained,
        mix=_mix(config),
        split=split,
        precision=precision,
        progress=progress,
        unrecorded=unrecorded,
        state=state,
    )


def check_precision(config: Config, device: torch.device) -> None:
    """Whether the device computes in the configured precision.

    Raises:
        UserError: it does not; names what it can.
    """
    if config.train.precision != "bf16" or has_bf16(device):
        return
    major, minor = torch.cuda.get_device_capability(device)
    # Loss scaling under ZeRO would be DeepSpeed's own.
    others = "fp32, or fp16 on ddp or fsdp2" if config.sharding.backend.startswith("zero") else "fp16 or fp32"
    raise UserError(
        f"train.precision bf16: {torch.cuda.get_device_name(device)} has none (its compute capability is "
        f"{major}.{minor}, bf16 needs 8.0); use {others}"
    )


def shared_out(config: Config, world: World, found: int | None = None) -> MicroBatches:
    """How the images of a step are shared out to these processes.

    Args:
        config: of the run.
        world: the processes.
        found: see `accumulation_on`.

    Raises:
        UserError: they cannot be, or DeepSpeed's configuration says otherwise.
    """
    split = micro_batches(config, world.size, found)
    if config.train.max_micro_batch == "auto" and found is None:
        return split  # not the last word
    if problems := list(batch_problems(config.sharding.deepspeed, config, split)):
        lines = (f"sharding.deepspeed.{'.'.join(map(str, problem.path))}: {problem.text}" for problem in problems)
        raise UserError("\n  ".join(lines))
    return split


def backend_of(config: Config, world: World) -> str:
    """The backend of a run on these processes."""
    return config.sharding.backend_on(world.size, launched=world.launched)


def build_hooks(
    config: Config, world: World, components: Components, phases: PhaseTimer, run: Run, bar: ProgressBar
) -> list[Hook]:
    """The hooks of a run, in the order in which they are called.

    Args:
        config: of the run.
        world: the processes.
        components: what is trained with.
        phases: times the steps.
        run: what is recorded goes there.
        bar: what a person sees goes there.
    """
    opt, ema = components.opt, components.ema
    averages = _averages(ema, components.trajectory)
    probes = ProbeSaving(config, world, components, run, bar) if config.method != "base" else None
    unrecorded = components.unrecorded
    hooks: list[Hook] = [
        LogEpochs(run, unrecorded) if probes is None else LogEpochs(run, unrecorded, lambda: probes.paused)
    ]
    if components.trajectory is not None:
        hooks.append(RunTrajectory(components.trajectory))
    mask = config.perturbation.mask if config.perturbation is not None else None
    refreshed = refreshed_section(config) is not None
    if refreshed:
        hooks.append(RefreshMask(config, world, components, run))
    if isinstance(mask, DepthMask) and mask.policy == "rotate":
        hooks.append(LogDrawnDensities(opt, unrecorded, run))
    elif mask is not None and not refreshed:
        hooks.append(LogFixedDensities(opt, run))
    if probes is not None:
        hooks.append(probes)  # after the mask is what the next step's is
    if ema is not None:
        hooks.append(UpdateEMA(ema))
    if config.data.on_damaged == "skip":
        hooks.append(ListDamaged(components.train, world, run, bar))
    if world.size > 1 and not config.train.compile:  # counting breaks a graph apart
        hooks.append(LogTraffic(run))
    agreement = Agreement(world)
    evaluate = Evaluate(config, world, components, run, bar, agreement)
    hooks += [
        # From here on nothing counts as a part of the step's time.
        LogMetrics(config, world, components, phases, run, bar),
        bar,
        AverageBatchNormStatistics(components.network, averages, world),
        evaluate,
        *([MeasureSharpness(config, world, components, run, bar, agreement)] if config.sharpness is not None else []),
        SaveCheckpoint(config, world, components, run.signals, evaluate, bar, agreement),
    ]
    return [*hooks, LogModel(config, run, components.progress)] if config.tracking.log_model else hooks


def _loaders(config: Config, world: World, split: MicroBatches) -> tuple[ImageLoader, ImageLoader]:
    """Of the training and of the validation images."""
    train = train_loader(
        config.data,
        rank=world.rank,
        world_size=world.size,
        device=world.device,
        seed=config.train.seed,
        micro_batch=split.images,
        num_classes=config.model.num_classes,
        indices=isinstance(config.trajectory, SAFTrajectory),
    )
    refreshed, images = refreshed_section(config), train.images * world.size
    if refreshed is not None and refreshed.by_samples and refreshed.samples > images:
        raise UserError(f"perturbation.mask.samples {refreshed.samples}: an epoch has only {images} images")
    val = eval_loader(
        config.data,
        rank=world.rank,
        world_size=world.size,
        device=world.device,
        micro_batch=split.images,
        num_classes=config.model.num_classes,
        workers=train.workers,
    )
    return train, val


def _sparse_sam(
    config: Config,
    module: nn.Module,
    base: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None,
    length: Length,
    phases: Phases,
) -> SparseSAM:
    """The optimizer; with ρ = 0 where the configuration has no perturbation."""
    options = perturbation_options(config, length)
    mask = options["mask"]
    try:
        return SparseSAM(
            module,
            base,
            **options,
            max_grad_norm=config.optimizer.clip_grad_norm,
            scaler=scaler,
            skip_nonfinite=config.train.on_nonfinite == "skip",
            phases=phases,
        )
    except ValueError as error:
        # The mask looks at the weights in the constructor; all else that can be wrong there is with the backend.
        by_mask = mask is not None and any(
            frame.f_locals.get("self") is mask for frame, _ in walk_tb(error.__traceback__)
        )
        raise UserError(f"{'perturbation.mask' if by_mask else 'sharding'}: {error}") from error


def soft_loss(config: Config, precision: torch.dtype, trajectory: Trajectory | None = None) -> LossFn:
    """The configured loss of labels or, once mixed, of label distributions.

    Where a batch has something for a trajectory term to go by, its term is added.
    """

    criterion = Criterion(config.loss)

    def loss_fn(forward: Any, batch: MicroBatch) -> Tensor:
        images, targets, *reference = batch
        logits = in_precision(forward, images, precision)
        loss = criterion(logits.float(), targets)
        return loss + trajectory.loss(logits, *reference) if trajectory is not None and reference else loss

    return loss_fn


def in_precision(forward: Any, images: Tensor, precision: torch.dtype) -> Tensor:
    """The logits of images, by autocast unless float32."""
    with torch.autocast(images.device.type, precision, enabled=precision != torch.float32):
        logits: Tensor = forward(images)
    return logits


def _averages(ema: EMA | None, trajectory: Trajectory | None) -> list[Average]:
    """All averaged weights of a run."""
    averages: list[Average] = [] if ema is None else [ema]
    return [*averages, trajectory.average] if isinstance(trajectory, MESA) else averages


def _trajectory(
    config: Config,
    world: World,
    module: nn.Module,
    network: nn.Module,
    sharding: ShardedWeights,
    precision: torch.dtype,
) -> Trajectory | None:
    """The loss term by outputs of earlier weights, if one is configured."""
    if config.trajectory is None:
        return None
    resumed = config.checkpoint.resume
    run = TrainingRun(
        world=world,
        module=module,
        forward=lambda images: in_precision(module, images, precision),
        average=lambda decay: EMA(network, decay, sharding),
        classes=config.model.num_classes,
        folder=outputs_folder(config.checkpoint.directory),
        elsewhere=[] if resumed in (None, "auto") else [outputs_folder(Path(resumed).parent)],
        checkpoints=config.checkpoint.keep + 1,  # the newest may still be being written
    )
    return build_trajectory(config.trajectory, run)


def outputs_folder(checkpoints: Path) -> Path:
    """Where SAF remembers outputs: beside the checkpoints that need them."""
    return checkpoints / "outputs"


def _check_outputs(config: Config, world: World, length: Length) -> None:
    """What can be said of SAF's memory before anything is built. Collective.

    Raises:
        UserError: the disk has no room for it, or not all processes see the folder.
    """
    term, section = config.trajectory, config.checkpoint
    if not isinstance(term, SAFTrajectory):
        return
    folder = outputs_folder(section.directory)
    epochs = min(
        epochs_kept(term.lag_epochs, section.every_epochs, section.keep + 1),
        length.epochs_begun - term.start_epoch + term.lag_epochs,
    )
    try:
        check_shared(folder, world)
        check_room(folder, length.images, config.model.num_classes, epochs)
    except UserError as error:
        raise UserError(f"trajectory.kind saf: {error}") from error


def perturbation_options(config: Config, length: Length) -> dict[str, Any]:
    """The arguments of `SparseSAM` that the configuration's section on the perturbation says.

    Raises:
        UserError: its window holds no step.
    """
    section: Perturbation | None = config.perturbation
    if section is None:
        return {"rho": 0.0, "mask": None}
    run = RunInfo(config.train.seed, length.steps, length.steps_per_epoch)
    return {
        "rho": section.rho,
        "norm": section.norm,
        "mask": None if section.mask is None else build_mask(section.mask, run),
        "adaptive": section.adaptive,
        "calibrate_every": section.calibrate_every,
        "direction": build_direction(section.direction),
        "descent": None if section.descent is None else DescentSamples(**section.descent.model_dump()),
        "loss_budget": section.loss_budget,
        "gap": section.gap,
        "gate": None if section.gate is None else Gate(run.steps, **section.gate.model_dump()),
        "savings": Savings(**section.savings.model_dump()),
        "schedule": build_schedule(section, run.steps),
    }


def _mix(config: Config) -> Mixing | None:
    mixup, cutmix = config.loss.mixup, config.loss.cutmix
    return Mixing(mixup, cutmix, config.model.num_classes, config.train.seed) if mixup or cutmix else None


@torch.no_grad()
def _try_forward(config: Config, model: nn.Module) -> None:
    """A resolution the model cannot take is found out here, in one line, and not by a process in the first step."""
    sides = [("progressive", side) for side in _sides(config)[:-1]]
    for key, side in (*sides, ("resolution", config.data.resolution), ("eval_resolution", config.data.eval_resolution)):
        try:
            with torch.random.fork_rng(devices=[]):
                logits = model.eval()(torch.zeros(1, 3, side, side))
        except (AssertionError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            if config.model.kwargs.get("global_pool", "avg") in ("", None):
                raise UserError(
                    f"model.kwargs.global_pool {config.model.kwargs['global_pool']!r}: {config.model.name} pools "
                    f"nothing then, which its classifier needs ({reason}); leave it out"
                ) from error
            raise UserError(f"data.{key}: {config.model.name} cannot take images of {side} px: {reason}") from error
        if logits.shape != (1, config.model.num_classes):
            raise UserError(
                f"model.kwargs {config.model.kwargs}: {config.model.name} gives {tuple(logits.shape)} for an image, "
                f"and {(1, config.model.num_classes)} is needed of a classifier; leave out what changes that"
            )
    model.train()


def _sides(config: Config) -> list[int]:
    """Of the training crops of all epochs, rising: there is more than one where they grow."""
    grows, largest = config.data.progressive, config.data.resolution
    return [largest] if grows is None else sorted({grows.side(e, largest) for e in range(grows.to_epoch + 1)})


@torch.no_grad()
def _try_micro_batch(config: Config, model: nn.Module, split: MicroBatches) -> None:
    """A micro-batch of one image that BatchNorm cannot normalise is found out here, and not in the first step."""
    section = config.perturbation
    fraction, key = 1.0, ""
    if section is not None:
        fraction, key = section.ascent_fraction, "direction.fraction"
        if section.descent is not None:
            fraction, key = min((fraction, key), (section.descent.fraction, "descent.fraction"))
    if first_samples(split.images, fraction) > 1 or not batchnorms(model):
        return
    side = _sides(config)[0]
    try:
        with (
            torch.random.fork_rng(devices=[]),
            frozen_statistics(model),
            torch.compiler.set_stance("force_eager"),
        ):
            model.train()(torch.zeros(1, 3, side, side))
    except ValueError as error:
        if "Expected more than 1 value per channel" not in str(error):
            raise
        why = (
            f"perturbation.{key} {fraction} leaves the {'ascent' if key == 'direction.fraction' else 'descent'}"
            if split.images > 1
            else f"{split} leave a pass"
        )
        raise UserError(
            f"{why} a single image, which BatchNorm of {config.model.name} cannot normalise at {side} px; take larger "
            "micro-batches (data.batch_size, train.accumulation, train.max_micro_batch) or a larger fraction"
        ) from error

"""`ssam-scale cost`: what the configured step would cost on a cluster, predicted, and one process of it simulated."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssam_scale.config.deepspeed import taken
from ssam_scale.config.mask_sections import BlockMask, ChosenMask, DepthMask, ElementMask, TensorMask
from ssam_scale.config.micro_batches import accumulation_on
from ssam_scale.config.schema import Config, Perturbation
from ssam_scale.config.trajectory_sections import MESATrajectory
from ssam_scale.costs.cluster import Cluster, Placement, ZeroSettings
from ssam_scale.costs.compute import StageTimes, StepTimes
from ssam_scale.costs.estimate import Activations, Footprint, StepCost, footprint, step_cost
from ssam_scale.costs.profile import Batch, Measured, load_times, measure_activations, measure_times, this_machine
from ssam_scale.costs.simulate import GivenPlan, Simulated, fake_world, simulate
from ssam_scale.costs.workload import Ascent, Weights, ascent_of, trained_shares, weights_of
from ssam_scale.data import open_images
from ssam_scale.errors import UserError
from ssam_scale.masks import Plan, ScoreBased
from ssam_scale.models import build_model, check_compiler, freeze, most_trained
from ssam_scale.perturbation import Gate, Norm, SparseSAM, StagedModel, StepShares, step_shares
from ssam_scale.perturbation.reference import first_samples
from ssam_scale.perturbation.schedules import build_schedule
from ssam_scale.sharding import World
from ssam_scale.sharding.device import PRECISIONS, choose_device, to_device, use_device
from ssam_scale.sharding.place import place, released

from .build import check_precision, perturbation_options, soft_loss
from .checkpoint_size import checkpoint_bytes, state_bytes_per_weight
from .length import Length, length_of
from .memory import averages_of
from .optimizer import base_optimizer, check_handed

# Of a moving cut, so many draws stand for all.
_DRAWS = 64


# Of an epoch, where no file is read to find out how long it is: what a mask, a schedule or a term does when.
_STEPS_PER_EPOCH = 1000


_RADIUS = 0.05


_ZERO_KEYS = {
    "reduce_bucket": "reduce_bucket_size",
    "persistent": "stage3_param_persistence_threshold",
    "reuse": "stage3_max_reuse_distance",
    "prefetch": "stage3_prefetch_bucket_size",
}


@dataclass(frozen=True)
class Machines:
    """The clusters asked about.

    Attributes:
        gpus: numbers of GPUs.
        per_node: GPUs of one node.
        node_bandwidth: bytes per second that a GPU sends inside of its node.
        network_bandwidth: bytes per second that a GPU sends to another node.
        scaling: `weak`, each GPU keeps the images that were measured; or `strong`, the configured batch is shared out.
    """

    gpus: Sequence[int]
    per_node: int = 8
    node_bandwidth: float = 300e9
    network_bandwidth: float = 25e9
    scaling: str = "weak"

    def check(self) -> None:
        """Look at what was asked for.

        Raises:
            UserError: it makes no cluster.
        """
        for option, value in (*(("gpus", n) for n in self.gpus), ("gpus-per-node", self.per_node)):
            if value < 1:
                raise UserError(f"--{option} is {value}; at least 1 is needed")
        for option in ("node_bandwidth", "network_bandwidth"):
            if not 0.0 < getattr(self, option) < math.inf:
                gigabytes = getattr(self, option) / 1e9
                raise UserError(f"--{option.replace('_', '-')} is {gigabytes:g}; a positive number of GB/s is needed")
        if self.scaling not in ("weak", "strong"):
            raise UserError(f"--scaling is {self.scaling!r}; there are weak and strong")

    def cluster(self, gpus: int) -> Cluster:
        """The one of so many GPUs."""
        return Cluster(gpus, self.per_node, self.node_bandwidth, self.network_bandwidth)


def cost_rows(config: Config, found: Measured, machines: Machines) -> list[dict[str, Any]]:
    """Rows of the cost of a mean step, for each number of GPUs: the base optimizer, dense SAM, the configured plan.

    `costs.estimate` says the assumptions. Of a plan whose steps differ, `seconds` and
    `bytes` are the mean step's and the memory the largest's. `images` are those of a GPU in a step, and `ascent_images`
    those of a micro-batch that an ascent sees; 0 without one.

    Raises:
        UserError: the configured backend does not go with so many GPUs, or there are more GPUs than images.
    """
    network, precision = staged_model(config), PRECISIONS[config.train.precision]
    total, state = found.weights, state_bytes_per_weight(config)
    kept = {name: averages_of(config.model_copy(update={"trajectory": None})) for name in ("base", "sam")}
    kept[config.method] = averages_of(config)
    placed: dict[int, tuple[Placement, float, int]] = {}
    for gpus in machines.gpus:
        if machines.scaling == "weak":
            images: float = (config.train.accumulation or 1) * found.images
            accumulation = accumulation_on(config, gpus, batch=int(images) * gpus)
        else:
            images, accumulation = config.data.batch_size / gpus, accumulation_on(config, gpus)
        if images < accumulation:
            raise UserError(
                f"--gpus {gpus}: data.batch_size {config.data.batch_size} gives each GPU less than one image in each "
                f"of {accumulation} micro-batches; use --scaling weak, or fewer GPUs"
            )
        placed[gpus] = placement_of(config, machines.cluster(gpus)), images, accumulation
    parts: dict[tuple[int, str], list[_PhaseCost]] = {}
    for share, steps in phases(config, network):
        base = base_optimizer(config, network.model)
        weights = weights_of(network, base, precision)
        opt = configured_sam(config, network, base)
        drawn = plans_of(config, opt)
        of_phase = times_of(found.times, weights, len(network.stages))
        dense = configured_sam(config.model_copy(update={"perturbation": None}), network, base)
        plans: dict[str, list[Ascent]] = {"base": [], "sam": [ascent_of(dense.resolve(), weights, len(network.stages))]}
        for gpus, (placement, images, accumulation) in placed.items():
            ours = ascents_of(config, network, opt, drawn, accumulation, steps)
            if ours or config.method not in plans:  # dense SAM as configured, too: its fraction, its interval
                plans[config.method] = ours
            one = images / accumulation
            times = replace(of_phase, images=one, micro_batches=accumulation)
            for name, ascents in plans.items():
                seen = [times.images_in(a.shape.fraction) for a in ascents if a.shape.ascends]
                part = _PhaseCost(
                    share,
                    step_cost(times, weights, ascents, placement, accumulation),
                    footprint(weights, ascents, placement, state, found.activations, one, accumulation, kept[name]),
                    max(seen, default=0.0),
                    sum(a.share * sum(a.perturbed.values()) for a in ascents),
                )
                parts.setdefault((gpus, name), []).append(part)
    rows = []
    for (gpus, name), each in parts.items():
        placement, images, accumulation = placed[gpus]
        cost = _mean_cost(each)
        if name == config.method:
            of_images = replace(found.times, images=images / accumulation, micro_batches=accumulation)
            more = reference_seconds(config, of_images)
            cost = replace(cost, seconds=cost.seconds + more, seconds_unhidden=cost.seconds_unhidden + more)
        memory = max((part.memory for part in each), key=lambda memory: memory.total)
        of_base = cost if name == "base" else _mean_cost(parts[gpus, "base"])
        rows.append(
            {
                "plan": name,
                "gpus": gpus,
                "backend": placement.backend,
                "replicas": placement.replicas,
                "images": images,
                "ascent_images": max(part.ascent_images for part in each),
                "density": sum(part.share * part.perturbed for part in each) / total,
                **asdict(cost),
                "seconds_over_base": cost.seconds / of_base.seconds,
                "bytes_over_base": cost.bytes / of_base.bytes if of_base.bytes else None,
                **{f"memory_{part}": value for part, value in asdict(memory).items()},
                "memory_model": memory.model,
                "memory_perturbing": memory.perturbing,
                "memory_total": memory.total,
                "memory_copy": checkpoint_bytes(total, kept[name], state),
                "scaling": machines.scaling,
                "hardware": found.hardware,
                "precision": found.precision,
                "model": found.model,
            }
        )
    return rows


@dataclass(frozen=True)
class _PhaseCost:
    """What a plan costs while the same parameters are trained.

    Attributes:
        share: of the run's steps that this is.
        cost: of the mean step.
        memory: of one GPU.
        ascent_images: of a micro-batch that an ascent sees.
        perturbed: weights in the mean step.
    """

    share: float
    cost: StepCost
    memory: Footprint
    ascent_images: float
    perturbed: float


def _mean_cost(parts: Sequence[_PhaseCost]) -> StepCost:
    """Over the whole run."""
    each = [[part.share * value for value in asdict(part.cost).values()] for part in parts]
    return StepCost(*map(sum, zip(*each, strict=True)))


def phases(config: Config, network: StagedModel) -> Iterator[tuple[float, range]]:
    """The parts of a run in which the same parameters are trained: their share of all steps, and which steps they are.

    While the caller looks at one, the others' parameters are frozen in `network`.

    Raises:
        UserError: `model.freeze` names what is not there, or everything.
    """
    length, sections = length_for(config), config.model.freeze
    begins = sorted({0, *(section.until_epoch for section in sections if section.until_epoch is not None)})
    for epoch, following in itertools.zip_longest(begins, begins[1:]):
        end = length.steps if following is None else min(following * length.steps_per_epoch, length.steps)
        steps = range(min(epoch * length.steps_per_epoch, end), end)
        if steps:
            freeze(network.model, sections, epoch)
            yield len(steps) / length.steps, steps


def times_of(times: StepTimes, weights: Weights, depth: int) -> StepTimes:
    """Of a network with all of its weights trained, the times with some of them frozen.

    Args:
        times: of a step.
        weights: which say whether they are.
        depth: stages of the network.
    """
    share = sum(w.numel for w in weights.values() if w.trained) / sum(w.numel for w in weights.values())
    return replace(times, optimizer=share * times.optimizer, trained=trained_shares(weights, depth))


def reference_seconds(config: Config, times: StepTimes) -> float:
    """What MESA's forward of the averaged weights adds to the mean step of the run; SAF computes nothing.

    Moving the average, and putting it in the place of the weights and back, is not counted, nor what gathers send.

    Args:
        config: of the run.
        times: of the parts, in seconds or whatever else.
    """
    term = config.trajectory
    if not isinstance(term, MESATrajectory):
        return 0.0
    length = length_for(config)
    return max(0.0, 1.0 - term.start_epoch / length.epochs) * sum(stage.forward for stage in times.stages)


def length_for(config: Config) -> Length:
    """The length of the run, as far as a mean step depends on it: no images are needed.

    One in epochs is the same whatever steps they have. Of one in steps the images tell how many epochs it is; where
    they are not here, an epoch is taken to have a thousand steps.
    """
    train, batch_size = config.train, config.data.batch_size
    if train.max_steps is None:
        assert train.epochs is not None  # which `Train` says
        return Length.of_epochs(train.epochs, _STEPS_PER_EPOCH * batch_size, batch_size)
    try:
        images = open_images(config.data.train).images
    except UserError:
        return Length(_STEPS_PER_EPOCH * batch_size, batch_size, train.max_steps, in_epochs=False)
    return length_of(config, images)


def predicted(config: Config, processes: int) -> dict[str, float]:
    """What the run is to cost by the times in `tracking.cost_times`, in percent, under its names in MLflow.

    Args:
        config: of the run.
        processes: that share its batch; in nodes and on a network as `Machines` has them by default.

    Raises:
        UserError: the file cannot be read, or is of another network.
    """
    path, key = config.tracking.cost_times, "tracking.cost_times"
    assert path is not None
    found = load_times(path, key)
    found.check(_expected(config, staged_model(config)), path, key)
    with torch.random.fork_rng(devices=[]):
        rows = cost_rows(config, found, Machines([processes], scaling="strong"))
    seconds = {row["plan"]: row["seconds"] for row in rows}
    own = seconds[config.method]
    return {
        "overhead/predicted_percent": 100.0 * (own / seconds["base"] - 1.0),
        "saving/predicted_percent": 100.0 * (1.0 - own / seconds["sam"]),
    }


def _expected(config: Config, network: StagedModel) -> dict[str, Any]:
    """Of what times must be, to be this run's."""
    return {
        "model": config.model.name,
        "resolution": config.data.resolution,
        "precision": config.train.precision,
        "weights": sum(p.numel() for p in network.parameters()),
        "stages": len(network.stages),
        "activation_checkpointing": network.activation_checkpointing,
        "compile": config.train.compile,
    }


def staged_model(config: Config) -> StagedModel:
    """The configured network, the same each time; nothing is frozen."""
    torch.manual_seed(config.train.seed)
    network = build_model(config).train()
    network.activation_checkpointing = config.train.activation_checkpointing
    return network


def _most_trained(config: Config) -> StagedModel:
    """The configured network in an epoch that trains all that any does."""
    network = staged_model(config)
    freeze(network.model, config.model.freeze, most_trained(config.model.freeze))
    return network


def configured_sam(config: Config, network: nn.Module, base: torch.optim.Optimizer) -> SparseSAM:
    """The configured optimizer in the middle of its run, a step with an ascent: its mask by random scores.

    Raises:
        UserError: there is no perturbation in the configuration, or its mask does not go with the network.
    """
    section, seen = config.perturbation, random_scores(config)
    try:
        if section is None:
            return SparseSAM(network, base, rho=_RADIUS)
        # Without the schedule: its step is to have an ascent.
        length = length_for(config)
        options = {**perturbation_options(seen, length), "schedule": None}
        opt = SparseSAM(network, base, **options, max_grad_norm=config.optimizer.clip_grad_norm)
        opt.steps = length.steps // 2
        if isinstance(opt.mask, ScoreBased):
            opt.refresh()
    except ValueError as error:
        raise UserError(f"perturbation: {error}") from error
    return opt


def random_scores(config: Config) -> Config:
    """The configuration with a mask of the same size that needs no images.

    One that is chosen by scores is chosen at random; a cut is drawn uniformly, from the same depths, if it would be
    drawn by what it costs.
    """
    section = config.perturbation
    if section is None or not isinstance(section.mask, (ChosenMask, DepthMask)):
        return config
    how: dict[str, Any] = {"draw": "uniform"} if isinstance(section.mask, DepthMask) else {"score": "random"}
    if isinstance(section.mask, ElementMask):
        how["dynamic"] = None
    if isinstance(section.mask, (TensorMask, BlockMask)):
        how["independent"] = False  # one draw is to have the size that many have in the mean
    mask = section.mask.model_copy(update=how)
    return config.model_copy(update={"perturbation": section.model_copy(update={"mask": mask})})


def plans_of(config: Config, opt: SparseSAM) -> list[Plan]:
    """What the configured mask perturbs: one plan, or many draws of a moving cut."""
    section = config.perturbation
    draws = _DRAWS if section is not None and isinstance(section.mask, DepthMask) else 1
    layout = opt.parameters.eligible(opt.param_groups)
    return [opt.mask.plan(layout, opt.steps + draw) for draw in range(draws)]


def ascents_of(
    config: Config,
    network: StagedModel,
    opt: SparseSAM,
    plans: Sequence[Plan],
    accumulation: int,
    during: range | None = None,
) -> list[Ascent]:
    """The kinds of steps that the configured run has with these plans, each as often, and how often each comes.

    Args:
        config: of the run.
        network: in stages.
        opt: the configured optimizer.
        plans: what its mask perturbs.
        accumulation: micro-batches of a step.
        during: which steps are counted; None: all.
    """
    section = config.perturbation
    if section is None:
        return []
    weights, depth = weights_of(network), len(network.stages)
    steps, every = length_for(config).steps, getattr(opt.mask, "every", None)
    counted = range(steps) if during is None else during
    often = step_shares(build_schedule(section, steps), opt.options, plans[0], counted, every)
    if section.gate is not None:  # whose first pass computes everything, and is the base step where it stays closed
        gated = section.gate.model_dump()
        often = StepShares(0.0, (often.sparse + often.dense) * Gate(steps, **gated).expected_share, 0.0)
    climbing = often.sparse + often.dense
    reuses = often.reused / climbing if climbing else 0.0
    ascents = []
    for plan in plans:
        for share, dense in ((often.sparse, False), (often.dense, True)):
            if share:
                resolved = opt.resolve(accumulation, plan=plan, dense=dense)
                ascents.append(ascent_of(resolved, weights, depth, share=share / len(plans), reuses=reuses))
    return ascents


def placement_of(config: Config, cluster: Cluster) -> Placement:
    """How the configuration shards the weights over a cluster.

    Raises:
        UserError: its backend does not go with so many GPUs or with the optimizer, or a setting of DeepSpeed's is no
            number.
    """
    backend = config.sharding.backend_on(cluster.gpus)
    check_handed(config, World())
    try:
        return Placement(backend, config.sharding.replicas, cluster, _zero_settings(config))
    except ValueError as error:
        raise UserError(f"--gpus {cluster.gpus}: {error}") from error


def _zero_settings(config: Config) -> ZeroSettings:
    """What the configuration's section for DeepSpeed says of them; keys of stage 3 may do without their prefix."""
    section = taken(config.sharding.deepspeed).get("zero_optimization", {})
    found = {}
    for field, key in _ZERO_KEYS.items():
        for name in (key, key.removeprefix("stage3_")):
            if name in section:
                try:
                    found[field] = int(float(section[name]))
                except (TypeError, ValueError) as error:
                    where = f"sharding.deepspeed.zero_optimization.{name}"
                    raise UserError(f"{where} is {section[name]!r}; a number is needed") from error
    return ZeroSettings(**found)


# Of the pass that is measured.
_CPU_IMAGES, _CUDA_IMAGES = 8, 64


def measured(config: Config, *, images: int | None, repeats: int, times: Path | None, save: Path | None) -> Measured:
    """The times of the network's parts: measured here, or read.

    Args:
        config: of the run.
        images: of the pass that is measured, at least 4; None: as many as suit the device.
        repeats: of which the median counts.
        times: a file to take them from instead.
        save: a file to write them to.

    Raises:
        UserError: the network does not take the configured images, the device is not there or not able to do it, or the
            file is of something else.
    """
    network = staged_model(config)
    expected = _expected(config, network)
    if times is not None:
        found = load_times(times)
        found.check(expected, times)
    else:
        device = choose_device(config.train.device)
        use_device(device)
        check_precision(config, device)
        if config.train.compile:
            check_compiler(device)
            network.compile()
        images = images or (_CUDA_IMAGES if device.type == "cuda" else _CPU_IMAGES)
        network, work, side = to_device(network, device), ConfiguredWork(config, device), config.data.resolution
        batch = (
            torch.randn(images, 3, side, side, device=device),
            torch.randint(config.model.num_classes, (images,), device=device),
        )
        try:
            activations = measure_activations(work, network, batch)
        except (AssertionError, RuntimeError, ValueError) as error:
            raise UserError(
                f"data.resolution: {config.model.name} cannot take {images} images of {side} px: "
                f"{str(error).splitlines()[0] if str(error) else type(error).__name__}"
            ) from error
        del expected["stages"]
        sizes = _sizes(images, config)
        step = measure_times(work, network, batch, base_optimizer(config, network.model), repeats, sizes)
        found = Measured(**expected, hardware=this_machine(config.train.device), times=step, activations=activations)
    if save is not None:
        found.save(save)
    return found


# Of the smallest pass that is measured: normalization over a batch needs two.
_FEWEST = 2


def _sizes(images: int, config: Config) -> set[int]:
    """How many images the passes have that are measured beside a whole one.

    Those of the configured ascent and descent; and halves, halves of these and so on, so that the times serve other
    fractions, too. Not where each size is compiled for itself, which takes minutes.
    """
    section = config.perturbation
    fractions = {section.ascent_fraction if section is not None else 1.0}
    if section is not None and section.descent is not None:
        fractions.add(section.descent.fraction)
    sizes = {max(_FEWEST, first_samples(images, fraction)) for fraction in fractions}
    if not config.train.compile:
        sizes |= {images >> halved for halved in range(1, images.bit_length()) if images >> halved >= _FEWEST}
    return sizes


class ConfiguredWork:
    """A pass as the configuration has it (`costs.profile.Work`)."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self._device, self._precision = device, PRECISIONS[config.train.precision]
        # Balanced weights, which take a look at the images, take as long as any.
        loss = config.loss
        if loss.class_weights == "balanced":
            loss = loss.model_copy(update={"class_weights": (1.0,) * config.model.num_classes})
        self._loss = soft_loss(config.model_copy(update={"loss": loss}), self._precision)

    def loss_fn(self, forward: Callable[[Tensor], Tensor], batch: Batch) -> Tensor:
        """The configured loss, of labels that are not mixed."""
        return self._loss(forward, batch)

    def autocast(self) -> torch.autocast:
        """The configured precision."""
        return torch.autocast(self._device.type, self._precision, enabled=self._precision != torch.float32)


# Of a micro-batch: neither what is sent nor what is held of the weights depends on them.
_IMAGES = 2


def simulated_rows(config: Config, cluster: Cluster) -> list[dict[str, Any]]:
    """Rows of what the first process of the job holds and sends, and what is predicted, one a plan.

    Of a plan whose steps differ, a step with an ascent; of a moving cut's draws, the one in the middle. `sent` and
    `predicted_sent` are bytes of a step; `held` and `predicted_held` the bytes of the process's weights, base
    optimizer's state and mask. The mask of a choice by scores is one by random scores, and `mask` says so.

    Raises:
        UserError: the configured backend cannot be simulated.
    """
    placement = placement_of(config, cluster)
    if placement.backend == "single":
        raise UserError("--dry-run: backend single sends nothing; add sharding.backend=fsdp2 or ddp, and --gpus 8")
    network = _most_trained(config)
    base = base_optimizer(config, network.model)
    weights, depth = weights_of(network, base, PRECISIONS[config.train.precision]), len(network.stages)
    numel = sum(w.numel for w in weights.values())
    alone = configured_sam(config, network, base)
    drawn = sorted(plans_of(config, alone), key=lambda plan: plan.perturbed)
    plan = drawn[len(drawn) // 2]
    state, nothing = state_bytes_per_weight(config), StepTimes.proportional((StageTimes(0.0, 0.0, 0.0, 0.0),) * depth)
    accumulation = accumulation_on(config, cluster.gpus)
    plans: dict[str, list[Ascent]] = {"base": []}
    if config.perturbation is not None:
        # The first kind of step is the mask's, or with the dense norm, the only one.
        plans[config.method] = ascents_of(config, network, alone, [plan], accumulation)[:1]
    mask = GivenPlan(plan)
    del network, base
    rows = []
    for name, ascents in plans.items():
        try:
            done = _simulated(config, placement, mask, accumulation, ascends=bool(ascents))
        except ValueError as error:
            raise UserError(f"sharding: {error}") from error
        always = [replace(a, share=1.0) for a in ascents]
        cost = step_cost(nothing, weights, always, placement, accumulation)
        memory = footprint(weights, always, placement, state, Activations(0.0, 0.0), 0.0, accumulation)
        rows.append(
            {
                "plan": name,
                "gpus": cluster.gpus,
                "backend": placement.backend,
                "replicas": placement.replicas,
                "density": sum(sum(ascent.perturbed.values()) for ascent in always) / numel,
                "mask": "by random scores" if isinstance(alone.mask, ScoreBased) and ascents else "as configured",
                "sent": sum(done.sent.values()),
                "sent_by_collective": done.sent,
                "predicted_sent": cost.bytes,
                "held": done.weights + done.optimizer + done.mask,
                "predicted_held": memory.weights + memory.optimizer + memory.mask,
                "memory_model": memory.model,
                "memory_perturbing": memory.perturbing,
            }
        )
    return rows


def _simulated(config: Config, placement: Placement, mask: GivenPlan, accumulation: int, *, ascends: bool) -> Simulated:
    section, side = config.perturbation, config.data.resolution
    work = ConfiguredWork(config, torch.device("cpu"))
    batches = [
        (torch.randn(_IMAGES, 3, side, side), torch.randint(config.model.num_classes, (_IMAGES,)))
        for _ in range(accumulation)
    ]
    # DeepSpeed logs to standard output, which is for the rows.
    with redirect_stdout(sys.stderr), fake_world(placement.cluster.gpus) as world:
        staged = _most_trained(config)
        blocks = [stage.block for stage in staged.stages]
        module, base = place(
            staged,
            blocks,
            placement.backend,
            world,
            partial(base_optimizer, config, staged.model),
            replicas=placement.replicas,
            batch_size=_IMAGES,
            accumulation=accumulation,
            max_grad_norm=config.optimizer.clip_grad_norm,
            deepspeed=taken(config.sharding.deepspeed),
            precision=PRECISIONS[config.train.precision],
        )
        if section is None or not ascends:
            opt = SparseSAM(module, base, rho=0.0, max_grad_norm=config.optimizer.clip_grad_norm)
        else:
            options = perturbation_options(random_scores(config), length_for(config))
            # A calibration is due in the first step, and its dense ascent is not the plan's usual one.
            options |= {"mask": mask, "schedule": None, "norm": _usual_norm(section)}
            opt = SparseSAM(module, base, **options, max_grad_norm=config.optimizer.clip_grad_norm)
        with released(module):
            done = simulate(opt, work.loss_fn, *batches)
        del opt, module, base, staged, blocks  # before the process group, which they hold on to
    return done


def _usual_norm(section: Perturbation) -> Norm:
    if section.norm != "calibrated":
        return section.norm
    return "dense" if section.calibrate_every == 1 else "masked"

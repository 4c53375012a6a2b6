"""What the configured step would cost, on one GPU and on a cluster."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from ssam_scale.bench.cluster import Cluster, Spreading, ZeroSettings
from ssam_scale.bench.cost import scaled, step_cost
from ssam_scale.bench.footprint import footprint
from ssam_scale.bench.measured import Measured
from ssam_scale.bench.shapes import ascent_of, weights_of
from ssam_scale.bench.weights import Ascent
from ssam_scale.config.masks import ChosenMask, DepthMask, ElementMask
from ssam_scale.config.schema import Config, Perturbation
from ssam_scale.errors import UserError
from ssam_scale.masks import Chosen, Plan
from ssam_scale.models import build_model
from ssam_scale.perturbation import SparseSAM, StagedModel

from .setup import base_optimizer, perturbation_options
from .times import state_bytes_per_weight

# Of a moving cut, so many draws stand for all.
_DRAWS = 64
# The mask needs to know when its sparsity changes; no file is read to find out how long an epoch is.
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
    per_node: int
    node_bandwidth: float
    network_bandwidth: float
    scaling: str

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
    mask = section.mask.model_copy(update=how)
    return config.model_copy(update={"perturbation": section.model_copy(update={"mask": mask})})


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
        options = {**perturbation_options(seen, _STEPS_PER_EPOCH), "schedule": None}
        opt = SparseSAM(network, base, **options, max_grad_norm=config.optimizer.clip_grad_norm)
        opt.steps = config.train.epochs * _STEPS_PER_EPOCH // 2
        if isinstance(opt.mask, Chosen):
            opt.refresh()
    except ValueError as error:
        raise UserError(f"perturbation: {error}") from error
    return opt


def plans_of(config: Config, opt: SparseSAM) -> list[Plan]:
    """What the configured mask perturbs: one plan, or many draws of a moving cut."""
    section = config.perturbation
    draws = _DRAWS if section is not None and isinstance(section.mask, DepthMask) else 1
    layout = opt.pool.eligible(opt.param_groups)
    return [opt.mask.plan(layout, opt.steps + draw) for draw in range(draws)]


def ascents_of(config: Config, network: StagedModel, opt: SparseSAM, plans: Sequence[Plan]) -> list[Ascent]:
    """The kinds of steps that the configured run has with these plans, each as often, and how often each comes."""
    section = config.perturbation
    if section is None:
        return []
    weights = weights_of(network)
    shares_prefix = opt.levers.share_prefix and config.train.accumulation == 1
    often = (section.window[1] - section.window[0]) / section.interval / len(plans)
    reuses = section.interval - 1 if section.reuse else 0
    ascents = []
    for plan in plans:
        dense = _dense_share(section, plan)
        for share, whole in ((1.0 - dense, False), (dense, True)):
            if share:
                one = ascent_of(opt, weights, dense=whole, shares_prefix=shares_prefix, share=share * often, plan=plan)
                ascents.append(replace(one, reuses=reuses))
    return ascents


def _dense_share(section: Perturbation, plan: Plan) -> float:
    """How many of the ascents need the gradient of every weight: those of the dense norm, and looks at all of it."""
    if section.norm == "dense":
        return 1.0
    looks = section.norm == "calibrated" or plan.takes_parts
    return 1.0 / section.calibrate_every if looks and section.calibrate_every else 0.0


def staged_model(config: Config) -> StagedModel:
    """The configured network, the same each time."""
    torch.manual_seed(config.train.seed)
    return build_model(config).train()


def cost_rows(config: Config, found: Measured, machines: Machines) -> list[dict[str, Any]]:
    """Rows of the cost of a mean step, for each number of GPUs: the base optimizer, dense SAM, the configured plan.

    `bench.cost` and `bench.footprint` say what is taken for granted. Of a plan whose steps differ, `seconds` and
    `bytes` are the mean step's and the memory the largest's.

    Raises:
        UserError: the configured backend does not go with so many GPUs, or there are more GPUs than images.
    """
    network = staged_model(config)
    base_of_ours = base_optimizer(config, network.model)
    weights, total = weights_of(network, base_of_ours), found.weights
    opt = configured_sam(config, network, base_of_ours)
    ours = ascents_of(config, network, opt, plans_of(config, opt))
    dense_config = config.model_copy(update={"perturbation": None})
    dense = configured_sam(dense_config, network, base_optimizer(config, network.model))
    plans: dict[str, list[Ascent]] = {"base": [], "sam": [ascent_of(dense, weights, dense=True, shares_prefix=False)]}
    if config.method not in plans:
        plans[config.method] = ours
    elif ours:  # dense SAM as configured: its fraction, its interval
        plans["sam"] = ours
    accumulation, state = config.train.accumulation, state_bytes_per_weight(config)
    rows = []
    for gpus in machines.gpus:
        spreading = spreading_of(config, machines.cluster(gpus))
        images = accumulation * found.images if machines.scaling == "weak" else config.data.batch_size / gpus
        if images < accumulation:
            raise UserError(
                f"--gpus {gpus}: data.batch_size {config.data.batch_size} gives each GPU less than one image in each "
                f"of {accumulation} micro-batches; use --scaling weak, or fewer GPUs"
            )
        times, base = scaled(found.times, images / found.images), None
        for name, ascents in plans.items():
            cost = step_cost(times, weights, ascents, spreading, accumulation)
            one = images / accumulation
            memory = footprint(weights, ascents, spreading, state, found.activations, one, accumulation)
            base = base or cost
            rows.append(
                {
                    "plan": name,
                    "gpus": gpus,
                    "backend": spreading.backend,
                    "replicas": spreading.replicas,
                    "images": images,
                    "density": sum(a.share * sum(a.perturbed.values()) for a in ascents) / total,
                    **asdict(cost),
                    "seconds_over_base": cost.seconds / base.seconds,
                    "bytes_over_base": cost.bytes / base.bytes if base.bytes else None,
                    **{f"memory_{part}": value for part, value in asdict(memory).items()},
                    "memory_model": memory.model,
                    "memory_perturbing": memory.perturbing,
                    "memory_total": memory.total,
                    "scaling": machines.scaling,
                    "hardware": found.hardware,
                    "precision": found.precision,
                    "model": found.model,
                }
            )
    return rows


def spreading_of(config: Config, cluster: Cluster) -> Spreading:
    """How the configuration spreads the weights over a cluster.

    Raises:
        UserError: its backend does not go with so many GPUs, or a setting of DeepSpeed's is no number.
    """
    backend = config.sharding.backend
    if backend == "auto":
        backend = "ddp" if cluster.gpus > 1 else "single"
    try:
        return Spreading(backend, config.sharding.replicas, cluster, _zero_settings(config))
    except ValueError as error:
        raise UserError(f"--gpus {cluster.gpus}: {error}") from error


def _zero_settings(config: Config) -> ZeroSettings:
    """What the configuration's section for DeepSpeed says of them; keys of stage 3 may do without their prefix."""
    section = config.sharding.deepspeed.get("zero_optimization", {})
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

"""`ssam-scale cost --dry-run`: one process of the configured job of many, next to what the cost model says of it."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ssam_scale.bench.cluster import Cluster, Spreading
from ssam_scale.bench.cost import step_cost
from ssam_scale.bench.footprint import Activations, footprint
from ssam_scale.bench.predict import StageTimes, StepTimes
from ssam_scale.bench.rehearsal import Presumed, Rehearsed, pretended, rehearse
from ssam_scale.bench.shapes import weights_of
from ssam_scale.bench.weights import Ascent
from ssam_scale.config.schema import Config, Perturbation
from ssam_scale.errors import UserError
from ssam_scale.masks import Chosen
from ssam_scale.perturbation import Levers, Norm, SparseSAM
from ssam_scale.sharding import place

from .cost import ascents_of, configured_sam, plans_of, spreading_of, staged_model
from .setup import base_optimizer
from .times import ConfiguredWork, state_bytes_per_weight

# Of a micro-batch: neither what is sent nor what is held of the weights depends on them.
_IMAGES = 2


def rehearsal_rows(config: Config, cluster: Cluster) -> list[dict[str, Any]]:
    """Rows of what the first process of the job holds and sends, and what is predicted, one a plan.

    Of a plan whose steps differ, a step with an ascent; of a moving cut's draws, the one in the middle. `sent` and
    `predicted_sent` are bytes of a step; `held` and `predicted_held` the bytes of the process's weights, base
    optimizer's state and mask. The mask of a choice by scores is one by random scores, and `mask` says so;
    where weights are spread what is sent of single weights and rows is not packed here, nor in `predicted_sent`.

    Raises:
        UserError: the configured backend cannot be pretended.
    """
    spreading = spreading_of(config, cluster)
    if spreading.backend == "single":
        raise UserError("--dry-run: backend single sends nothing; add sharding.backend=fsdp2 or ddp, and --gpus 8")
    network = staged_model(config)
    base = base_optimizer(config, network.model)
    weights, depth = weights_of(network, base), len(network.stages)
    numel = sum(w.numel for w in weights.values())
    alone = configured_sam(config, network, base)
    drawn = sorted(plans_of(config, alone), key=lambda plan: plan.perturbed)
    plan = drawn[len(drawn) // 2]
    state, nothing = state_bytes_per_weight(config), StepTimes((StageTimes(0.0, 0.0, 0.0, 0.0),) * depth, 0.0, 0.0)
    plans: dict[str, list[Ascent]] = {"base": []}
    if config.perturbation is not None:
        # The first kind of step is the mask's, or with the dense norm, the only one.
        plans[config.method] = ascents_of(config, network, alone, [plan])[:1]
    mask = Presumed(plan)
    del network, base
    rows = []
    for name, ascents in plans.items():
        try:
            done = _rehearsed(config, spreading, mask, ascends=bool(ascents))
        except ValueError as error:
            raise UserError(f"sharding: {error}") from error
        # Where weights are spread a process needs to know the others' parts of a mask to pack what it sends them, and
        # here are none.
        packs = spreading.shards == 1
        always = [replace(a, share=1.0, between=a.between if packs else None) for a in ascents]
        cost = step_cost(nothing, weights, always, spreading, config.train.accumulation)
        memory = footprint(
            weights, always, spreading, state, Activations(0.0, 0.0), 0.0, accumulation=config.train.accumulation
        )
        rows.append(
            {
                "plan": name,
                "gpus": cluster.gpus,
                "backend": spreading.backend,
                "replicas": spreading.replicas,
                "density": sum(sum(ascent.perturbed.values()) for ascent in always) / numel,
                "mask": "by random scores" if isinstance(alone.mask, Chosen) and ascents else "as configured",
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


def _usual_norm(section: Perturbation) -> Norm:
    if section.norm != "calibrated":
        return section.norm
    return "dense" if section.calibrate_every == 1 else "masked"


def _rehearsed(config: Config, spreading: Spreading, mask: Presumed, *, ascends: bool) -> Rehearsed:
    section, side = config.perturbation, config.data.resolution
    work = ConfiguredWork(config, torch.device("cpu"))
    batches = [
        (torch.randn(_IMAGES, 3, side, side), torch.randint(config.model.num_classes, (_IMAGES,)))
        for _ in range(config.train.accumulation)
    ]
    # DeepSpeed tells its story on standard output, where the rows belong.
    with redirect_stdout(sys.stderr), pretended(spreading.cluster.gpus) as world:
        staged = staged_model(config)
        blocks = [stage.block for stage in staged.stages]
        module, base = place(
            staged,
            blocks,
            spreading.backend,
            world,
            partial(base_optimizer, config, staged.model),
            replicas=spreading.replicas,
            batch_size=_IMAGES,
            accumulation=config.train.accumulation,
            max_grad_norm=config.optimizer.clip_grad_norm,
            deepspeed=config.sharding.deepspeed,
        )
        if section is None or not ascends:
            opt = SparseSAM(module, base, rho=0.0, max_grad_norm=config.optimizer.clip_grad_norm)
        else:
            opt = SparseSAM(
                module,
                base,
                rho=section.rho,
                mask=mask,
                # A calibration is due in the first step, and its dense ascent is not the plan's usual one.
                norm=_usual_norm(section),
                adaptive=section.adaptive,
                fraction=section.fraction,
                levers=Levers(**section.levers.model_dump()),
                max_grad_norm=config.optimizer.clip_grad_norm,
            )
        done = rehearse(opt, work.loss_fn, *batches)
        del opt, module, base, staged, blocks  # before the process group, which they hold on to
    return done

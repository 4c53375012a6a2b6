"""The bytes that processes send each other in a step by plan and backend, next to dense SAM's and to the least.

Beside what is counted stand what the cost model predicts for the same step and the floor of the ascent: what its passes
must gather on that backend, and the density of what is reduced (`BackendCosts.floor`).
"""

from __future__ import annotations

import copy
import gc
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from ssam_scale.costs.backends import BackendCosts, costs_of
from ssam_scale.costs.cluster import Cluster, Placement, ZeroSettings
from ssam_scale.costs.workload import Ascent, ascent_of, weights_of
from ssam_scale.errors import UserError
from ssam_scale.perturbation import SparseSAM, StagedModel
from ssam_scale.perturbation.directions import scope_of
from ssam_scale.sharding import BACKENDS, World
from ssam_scale.sharding.collectives import Traffic
from ssam_scale.sharding.place import place, released

from .networks import Setting
from .processes import on_ranks
from .scenarios import Scenario, sgd_by_shape, sharded_scenarios, sparse_sam
from .step_time import environment

# In the very first step a mask may look at the whole gradient.
_FIRST = 1
# Steps are counted when each kind of them has come so often: stage 3 records a kind of pass in its first two. DDP has
# settled its buckets after the very first.
_SEEN = {"zero3": 2}
_DEFAULTS = ZeroSettings()
# What takes seconds to import, once for all processes; the last is what DeepSpeed imports for its first engine.
_IMPORTED = (
    "ssam_scale.bench.bytes_sent",
    "ssam_scale.models.timm_model",
    "ssam_scale.sharding.zero.stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
)
# Of the floor, by which an ascent may be above it: norms are summed, and shards of a mask are not all alike.
_ALLOWED = 1.02


@dataclass(frozen=True)
class BackendSetup:
    """A backend, and how often it replicates the weights.

    Attributes:
        backend: as `place` takes it.
        replicas: copies of the weights, each sharded over as many processes as were asked for.
    """

    backend: str
    replicas: int = 1


_BY_BACKEND = {name: BackendSetup(name) for name, backend in BACKENDS.items() if backend.value.launchers is not None}
SETUPS: Mapping[str, BackendSetup] = dict(sorted({**_BY_BACKEND, "hsdp": BackendSetup("fsdp2", 2)}.items()))
"""Every registered backend of several processes, and FSDP2 in two copies."""


def chosen_backends(names: Sequence[str] | None) -> list[str]:
    """Names of the backends asked for, in the order of `SETUPS`; None: all.

    Raises:
        UserError: there is none of such a name.
    """
    for name in names or ():
        if name not in SETUPS:
            raise UserError(f"--backends: there is no backend {name!r}; there are {', '.join(SETUPS)}")
    return [name for name in SETUPS if names is None or name in names]


@dataclass(frozen=True)
class Job:
    """One plan on one backend.

    Attributes:
        backend: of `SETUPS`.
        plan: name of a scenario; by name, because what builds a mask need not be picklable.
    """

    backend: str
    plan: str


@dataclass(frozen=True)
class Counted:
    """What one process sent in the mean step of a job, and what it should have.

    Attributes:
        density: the perturbed share.
        bytes: by collective.
        calls: of collectives.
        predicted: bytes of the whole step, by the cost model.
        floor: bytes that the ascent must add to a step of the base optimizer.
    """

    density: float
    bytes: Mapping[str, float]
    calls: float
    predicted: float
    floor: float


@contextmanager
def sharded_optimizer(
    setting: Setting,
    setup: BackendSetup,
    world: World,
    scenario: Scenario,
    zero: ZeroSettings = _DEFAULTS,
    network: StagedModel | None = None,
) -> Iterator[SparseSAM]:
    """The optimizer of a scenario on its own network, sharded or replicated over the processes of `world`.

    At the end, what backends keep of it is given back.

    Args:
        setting: on what.
        setup: the backend.
        world: the processes.
        scenario: how to step.
        zero: settings of stage 3.
        network: the setting's, and nobody else's; None: built anew.
    """
    network = setting.network() if network is None else network
    on_zero = {"zero_optimization": {"stage3_param_persistence_threshold": zero.persistent}}
    module, base = place(
        network,
        [stage.block for stage in network.stages],
        setup.backend,
        world,
        partial(sgd_by_shape, network),
        replicas=setup.replicas,
        batch_size=setting.batch_size,
        deepspeed=on_zero if setup.backend.startswith("zero") else None,
        precision=setting.dtype,
    )
    with released(module):
        yield sparse_sam(module, base, scenario)


def count_bytes(world: World, setting: Setting, jobs: Sequence[Job], zero: ZeroSettings = _DEFAULTS) -> list[Counted]:
    """What each job sends. Collective.

    Args:
        world: the processes.
        setting: on what.
        jobs: the plans, and the backends that they are taken on.
        zero: settings of stage 3.
    """
    known = {scenario.name: scenario for scenario in sharded_scenarios()}
    network, batch = setting.network(), setting.batch()
    weights = weights_of(network, sgd_by_shape(network), setting.dtype)
    steps = {plan: _steps(known[plan], copy.deepcopy(network)) for plan in dict.fromkeys(job.plan for job in jobs)}
    found = []
    gc.collect()
    gc.freeze()  # what is there already: looking through it takes longer than most steps
    for job in jobs:
        setup, scenario = SETUPS[job.backend], known[job.plan]
        with sharded_optimizer(setting, setup, world, scenario, zero, copy.deepcopy(network)) as opt:
            for _ in range(_FIRST):
                opt.step(setting.loss_fn, batch)
            for _ in range(_SEEN.get(job.backend, 1)):
                opt.steps = _FIRST
                for _ in range(scenario.steps):
                    opt.step(setting.loss_fn, batch)
            opt.steps, densities = _FIRST, []
            with Traffic() as traffic:
                for _ in range(scenario.steps):
                    densities.append(opt.density)
                    opt.step(setting.loss_fn, batch)
        del opt
        gc.collect()  # modules, hooks and optimizers hold each other
        cluster = Cluster(world.size, world.size, 1.0, 1.0)
        costs = costs_of(weights, Placement(setup.backend, setup.replicas, cluster, zero))
        taken = steps[job.plan]
        found.append(
            Counted(
                statistics.fmean(densities),
                {name: sent / scenario.steps for name, sent in traffic.bytes.items()},
                sum(traffic.calls.values()) / scenario.steps,
                statistics.fmean(_predicted(costs, ascent) for ascent in taken),
                statistics.fmean(0.0 if a is None else sum(s.bytes for s in costs.floor(a)) for a in taken),
            )
        )
    gc.unfreeze()
    return found


def _steps(scenario: Scenario, network: StagedModel) -> list[Ascent | None]:
    """The ascents of the steps that are counted, as one process with all of the weights takes them: the same ones."""
    base = sgd_by_shape(network)
    weights, alone = weights_of(network, base), sparse_sam(network, base, scenario)
    taken: list[Ascent | None] = []
    for step in range(scenario.steps):
        alone.steps = _FIRST + step
        resolved = alone.resolve(plan=alone.plan)  # also of a direction that is known after a first step only
        taken.append(ascent_of(resolved, weights, len(network.stages)) if resolved.perturbs else None)
    return taken


def _has(setup: BackendSetup, scenario: Scenario) -> bool:
    """Whether there is the scenario's scope on a backend; others it would refuse."""
    scope = scope_of(scenario.direction) if scenario.direction is not None else "global"
    if scope == "shard_group":
        return setup.replicas > 1
    if scope == "worker":
        return setup.backend not in ("fsdp2", "zero3")
    return True


def _predicted(costs: BackendCosts, ascent: Ascent | None) -> float:
    passes = [costs.descent(ascent)] + ([] if ascent is None else [costs.ascent(ascent)])
    return sum(sent.bytes for traffic in passes for sent in (*traffic.forward, *traffic.backward, *traffic.after))


def _measure(rank: int, size: int, device: torch.device, setting: Setting, jobs: Sequence[Job]) -> list[Any]:
    return [vars(counted) for counted in count_bytes(World(rank, size, device), setting, jobs)]


def bench_bytes(
    setting: Setting, ranks: int, backends: Sequence[str], compared: Sequence[Scenario]
) -> list[dict[str, Any]]:
    """Rows of what one process sends in a step, one a backend and plan: see `rows_of`.

    Args:
        setting: on what; one that `Setting.check` finds nothing wrong with. Its batch is each process's own.
        ranks: processes that one copy of the weights is sharded over, or that hold one each; at least 2.
        backends: by name.
        compared: the plans, with `base` and `sam` among them.

    Raises:
        UserError: a process was killed.
    """
    by_size: dict[int, list[Job]] = {}
    for backend in backends:
        replicas = SETUPS[backend].replicas
        plans = [scenario.name for scenario in compared if _has(SETUPS[backend], scenario)]
        by_size.setdefault(ranks * replicas, []).extend(Job(backend, plan) for plan in plans)
    # One start of processes for all that has as many of them.
    found = {
        job: (size, Counted(**counts))
        for size, jobs in by_size.items()
        for job, counts in zip(jobs, on_ranks(size, _measure, setting, jobs, imported=_IMPORTED), strict=True)
    }
    return rows_of(setting, found)


def rows_of(setting: Setting, found: Mapping[Job, tuple[int, Counted]]) -> list[dict[str, Any]]:
    """Rows of what was counted, by backend; `sharding.collectives` says how bytes are counted.

    `step_bytes` are those of a whole step and `ascent_bytes` what the plan adds to a step of the base optimizer on the
    same backend, whose one pass costs what a descent pass costs; both also by collective, and `step_calls` and
    `ascent_calls` the number of collectives. `ascent_bytes_over_dense` is the ratio to dense SAM's ascent,
    `floor_over_dense` that of the least that the plan's ascent must send on this backend (`BackendCosts.floor`), and
    `target_over_dense`, two percent above, the most that we want: a plan that leaves a saving out is above it by what
    the saving is worth. `predicted_bytes` are the cost model's for the step. Of plans whose steps differ, all are means
    over a period or several draws, each of which has been taken before.

    Args:
        setting: on what.
        found: by job, the number of processes and what one sent; with the plans `base` and `sam` of each backend.
    """
    common = environment(setting, 1)
    rows = []
    for job, (size, counted) in found.items():
        base, dense = (found[replace(job, plan=plan)][1] for plan in ("base", "sam"))
        dense_ascent = _total(_minus(dense.bytes, base.bytes))
        ascent = _minus(counted.bytes, base.bytes)
        floor = counted.floor / dense_ascent
        rows.append(
            {
                "model": setting.model,
                "backend": job.backend,
                "plan": job.plan,
                "ranks": size,
                "replicas": SETUPS[job.backend].replicas,
                "density": counted.density,
                "step_bytes": _total(counted.bytes),
                "step_bytes_by_collective": counted.bytes,
                "step_calls": counted.calls,
                "predicted_bytes": counted.predicted,
                "ascent_bytes": _total(ascent),
                "ascent_bytes_by_collective": ascent,
                "ascent_calls": counted.calls - base.calls,
                "floor_bytes": counted.floor,
                "step_bytes_over_base": _total(counted.bytes) / _total(base.bytes),
                "ascent_bytes_over_dense": _total(ascent) / dense_ascent,
                "floor_over_dense": None if job.plan == "base" else floor,
                "target_over_dense": None if job.plan == "base" else _ALLOWED * floor,
                **common,
            }
        )
    return rows


def _minus(of: Mapping[str, float], base: Mapping[str, float]) -> dict[str, float]:
    return {name: of.get(name, 0.0) - base.get(name, 0.0) for name in {**base, **of}}


def _total(by_collective: Mapping[str, float]) -> float:
    return sum(by_collective.values())

"""The bytes that processes send each other in a step by plan and backend, next to dense SAM's."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ssam_scale.costs.collectives import Traffic
from ssam_scale.errors import UserError
from ssam_scale.perturbation import SparseSAM
from ssam_scale.sharding import BACKENDS, World
from ssam_scale.sharding.place import place

from .networks import Setting
from .processes import on_ranks
from .scenarios import Scenario, sgd, sharded_scenarios, sparse_sam
from .step_time import environment

# FSDP2 learns the order of modules from the first steps. In the very first one a mask may look at the whole gradient.
_WARM_UP = 2
# Stage 3 records each kind of pass once and takes it up the second time: the same steps, with the same cuts, once more.
_REPEATS = 3
_ROUNDS = 2
_WITHIN_SHARD_GROUP = "sam, within the shard group"


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


def sharded_optimizer(setting: Setting, setup: BackendSetup, world: World, scenario: Scenario) -> SparseSAM:
    """The optimizer of a scenario on its own network, sharded or replicated over the processes of `world`."""
    network = setting.network()
    module, base = place(
        network,
        [stage.block for stage in network.stages],
        setup.backend,
        world,
        partial(sgd, network),
        replicas=setup.replicas,
        batch_size=setting.batch_size,
    )
    return sparse_sam(module, base, scenario)


def _measure(
    rank: int, size: int, device: torch.device, setting: Setting, jobs: Sequence[tuple[str, str]]
) -> list[Any]:
    world = World(rank, size, device)
    known = {
        scenario.name: scenario for scenario in sharded_scenarios()
    }  # by name: what builds a mask need not be picklable
    batch = setting.batch()
    found = []
    for backend, name in jobs:
        scenario = known[name]
        opt = sharded_optimizer(setting, SETUPS[backend], world, scenario)
        for _ in range(_WARM_UP):
            opt.step(setting.loss_fn, batch)
        first = opt.steps
        for _ in range(_REPEATS):
            opt.steps, densities = first, []
            with Traffic() as traffic:
                for _ in range(_ROUNDS * scenario.steps):
                    densities.append(opt.density)
                    opt.step(setting.loss_fn, batch)
        found.append(
            {
                "density": statistics.fmean(densities),
                "bytes": {name: sent / len(densities) for name, sent in traffic.bytes.items()},
                "calls": sum(traffic.calls.values()) / len(densities),
            }
        )
        del opt
        gc.collect()  # modules, hooks and optimizers hold each other
    return found


def bench_bytes(
    setting: Setting, ranks: int, backends: Sequence[str], compared: Sequence[Scenario]
) -> list[dict[str, Any]]:
    """Rows of what one process sends in a step, one a backend and plan; `costs.collectives` says how bytes are counted.

    `step_bytes` are those of a whole step and `ascent_bytes` what the plan adds to a step of the base optimizer on the
    same backend, whose one pass costs what a descent pass costs; both also by collective, and `step_calls` and
    `ascent_calls` the number of collectives. `ascent_bytes_over_dense` is the ratio to dense SAM's ascent and
    `target_over_dense` the most that we want: the density and one percent. Of plans whose steps differ, all are means
    over a period or several draws, each of which has been taken before.

    Args:
        setting: on what; one that `Setting.check` finds nothing wrong with. Its batch is each process's own.
        ranks: processes that one copy of the weights is sharded over, or that hold one each; at least 2.
        backends: by name.
        compared: the plans, with `base` and `sam` among them.

    Raises:
        UserError: a process was killed.
    """
    by_size: dict[int, list[tuple[str, str]]] = {}
    for backend in backends:
        replicas = SETUPS[backend].replicas
        plans = [scenario.name for scenario in compared if replicas > 1 or scenario.name != _WITHIN_SHARD_GROUP]
        by_size.setdefault(ranks * replicas, []).extend((backend, plan) for plan in plans)
    # One start of processes for all that has as many of them: importing DeepSpeed alone takes seconds.
    found = {
        job: (size, counts)
        for size, jobs in by_size.items()
        for job, counts in zip(jobs, on_ranks(size, _measure, setting, jobs), strict=True)
    }
    common = environment(setting, 1)
    rows = []
    for backend in backends:
        base, dense = found[backend, "base"][1], found[backend, "sam"][1]
        dense_ascent = _total(_minus(dense["bytes"], base["bytes"]))
        for (of, plan), (size, counts) in found.items():
            if of != backend:
                continue
            ascent = _minus(counts["bytes"], base["bytes"])
            rows.append(
                {
                    "model": setting.model,
                    "backend": backend,
                    "plan": plan,
                    "ranks": size,
                    "replicas": SETUPS[backend].replicas,
                    "density": counts["density"],
                    "step_bytes": _total(counts["bytes"]),
                    "step_bytes_by_collective": counts["bytes"],
                    "step_calls": counts["calls"],
                    "ascent_bytes": _total(ascent),
                    "ascent_bytes_by_collective": ascent,
                    "ascent_calls": counts["calls"] - base["calls"],
                    "step_bytes_over_base": _total(counts["bytes"]) / _total(base["bytes"]),
                    "ascent_bytes_over_dense": _total(ascent) / dense_ascent,
                    "target_over_dense": None if plan == "base" else counts["density"] + 0.01,
                    **common,
                }
            )
    return rows


def _minus(of: Mapping[str, float], base: Mapping[str, float]) -> dict[str, float]:
    return {name: of.get(name, 0.0) - base.get(name, 0.0) for name in {**base, **of}}


def _total(by_collective: Mapping[str, float]) -> float:
    return sum(by_collective.values())

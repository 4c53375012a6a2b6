"""What processes send each other, counted on real ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.profiler import ProfilerActivity, profile

from ssam_scale.bench.bytes_sent import SETUPS, sharded_optimizer
from ssam_scale.bench.networks import Setting
from ssam_scale.bench.scenarios import sharded_scenarios
from ssam_scale.sharding import World
from ssam_scale.sharding.collectives import Traffic, ring_bytes
from tests.support.ranks import run_ranks
from tests.support.traffic import sent_by

N = 6000  # elements of a whole tensor, float32: divides over 2 and 3 processes
SETTING = Setting("test_vit", 32, 2, torch.device("cpu"))


def collectives(world: World) -> dict[str, tuple[str, Callable[[], Any]]]:
    part, whole, everyone = torch.ones(N // world.size), torch.ones(N), dist.group.WORLD
    assert everyone is not None

    def parts() -> list[torch.Tensor]:
        return list(torch.ones(N).split(N // world.size))

    def reshard() -> None:
        mesh = dist.init_device_mesh("cpu", (world.size,))
        DTensor.from_local(part, mesh, (Shard(0),)).redistribute(placements=(Replicate(),)).to_local().sum()

    return {
        "all_reduce": ("all_reduce", lambda: dist.all_reduce(whole)),
        "all_reduce of a subgroup of one": (
            "none",
            lambda: dist.all_reduce(whole, group=dist.new_group([world.rank], use_local_synchronization=True)),
        ),
        "all_gather": ("all_gather", lambda: dist.all_gather(parts(), part)),
        "all_gather into one": ("all_gather", lambda: dist.all_gather_into_tensor(whole, part)),
        "reduce_scatter": ("reduce_scatter", lambda: dist.reduce_scatter(part, parts())),
        "reduce_scatter of one": ("reduce_scatter", lambda: dist.reduce_scatter_tensor(part, whole)),
        "broadcast": ("broadcast", lambda: dist.broadcast(whole, 0)),
        "reduce": ("reduce", lambda: dist.reduce(whole, 0)),
        "all_to_all": ("all_to_all", lambda: dist.all_to_all_single(torch.empty(N), whole)),
        "barrier": ("none", dist.barrier),
        "functional all_reduce": ("all_reduce", lambda: functional.all_reduce(whole, "sum", everyone).sum()),
        "functional all_gather": ("all_gather", lambda: functional.all_gather_tensor(part, 0, everyone).sum()),
        "functional reduce_scatter": (
            "reduce_scatter",
            lambda: functional.reduce_scatter_tensor(whole, "sum", 0, everyone).sum(),
        ),
        "a DTensor made whole": ("all_gather", reshard),
    }


def _each(world: World) -> dict[str, tuple[str, dict[str, float]]]:
    return {name: (kind, dict(sent_by(call).bytes)) for name, (kind, call) in collectives(world).items()}


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_every_collective_is_counted_once_by_the_ring(size: int) -> None:
    for found in run_ranks(size, _each):
        for name, (kind, sent) in found.items():
            expected = {} if kind == "none" else {kind: ring_bytes(kind, 4 * N, size)}
            assert sent == pytest.approx(expected), name


def test_the_ring_by_hand() -> None:
    assert ring_bytes("all_reduce", 100, 4) == 150.0
    assert ring_bytes("all_gather", 100, 4) == ring_bytes("reduce_scatter", 100, 4) == 75.0
    assert ring_bytes("broadcast", 100, 4) == 100.0
    assert all(ring_bytes(kind, 100, 1) == 0.0 for kind in ("all_reduce", "all_gather", "broadcast"))
    assert ring_bytes("barrier", 100, 4) == 0.0
    with pytest.raises(ValueError, match="no collective 'gossip'"):
        ring_bytes("gossip", 1, 2)


def _both(world: World, backends: list[str]) -> dict[str, tuple[dict[str, int], dict[str, int]]]:
    [scenario] = [scenario for scenario in sharded_scenarios() if scenario.name == "cut 0.5"]
    found = {}
    for backend in backends:
        batch = SETTING.batch()
        with sharded_optimizer(SETTING, SETUPS[backend], world, scenario) as opt:
            for _ in range(2):
                opt.step(SETTING.loss_fn, batch)
            with profile(activities=[ProfilerActivity.CPU]) as seen, Traffic() as traffic:
                opt.step(SETTING.loss_fn, batch)
        transport = Counter(event.name for event in seen.events() or [] if event.name.startswith("gloo:"))
        found[backend] = dict(traffic.calls), dict(transport)
    return found


@pytest.mark.slow
def test_no_collective_of_a_backend_is_missed() -> None:
    """gloo itself, below all that could go past the recorder, has carried as many; a reduce_scatter as all_reduce."""
    for calls, transport in run_ranks(2, _both, ["ddp", "fsdp2", "zero3"])[0].values():
        assert sum(calls.values()) == sum(transport.values()) > 0
        assert calls.get("all_gather", 0) == transport.get("gloo:all_gather", 0)

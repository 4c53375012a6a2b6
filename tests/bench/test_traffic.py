"""What processes send each other, counted on real ones; and `ssam-scale bench bytes`, run as its users run it."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.profiler import ProfilerActivity, profile

from ssam_scale.bench.bytes_sent import SPREADS, placed
from ssam_scale.bench.networks import Setting
from ssam_scale.bench.scenarios import spread_ways
from ssam_scale.cli.main import main
from ssam_scale.costs.collectives import Traffic, ring_bytes, sent_by
from ssam_scale.sharding import World
from tests.support.ranks import run_ranks

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
    [way] = [way for way in spread_ways() if way.name == "cut 0.5"]
    found = {}
    for backend in backends:
        opt, batch = placed(SETTING, SPREADS[backend], world, way), SETTING.batch()
        for _ in range(2):
            opt.step(SETTING.loss_fn, batch)
        with profile(activities=[ProfilerActivity.CPU]) as seen, Traffic() as traffic:
            opt.step(SETTING.loss_fn, batch)
        transport = Counter(event.name for event in seen.events() or [] if event.name.startswith("gloo:"))
        found[backend] = dict(traffic.calls), dict(transport)
        del opt
    return found


@pytest.mark.slow
def test_no_collective_of_a_backend_is_missed() -> None:
    """gloo itself, below all that could go past the recorder, has carried as many; a reduce_scatter as all_reduce."""
    for calls, transport in run_ranks(2, _both, ["ddp", "fsdp2", "zero3"])[0].values():
        assert sum(calls.values()) == sum(transport.values()) > 0
        assert calls.get("all_gather", 0) == transport.get("gloo:all_gather", 0)


@pytest.mark.slow
def test_the_bytes_of_plans_and_backends() -> None:
    wanted = ["cut 0.5", "norm", "interval 2", "element 50%"]
    line = [sys.executable, "-m", "ssam_scale", "bench", "bytes", "--models", "test_vit", "--json"]
    line += [part for name in wanted for part in ("--plans", name)]
    line += [part for name in ("ddp", "fsdp2", "hsdp") for part in ("--backends", name)]
    result = subprocess.run(line, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    rows = {(row["backend"], row["plan"]): row for row in json.loads(result.stdout)}
    network = SETTING.network()
    whole = 4 * sum(p.numel() for p in network.parameters())
    for (backend, plan), row in rows.items():
        assert row["ranks"] == (4 if backend == "hsdp" else 2)
        assert row["step_bytes"] == pytest.approx(sum(row["step_bytes_by_collective"].values()))
        assert row["ascent_bytes"] == pytest.approx(row["step_bytes"] - rows[backend, "base"]["step_bytes"])
        over = row["ascent_bytes"] / rows[backend, "sam"]["ascent_bytes"]
        assert row["ascent_bytes_over_dense"] == pytest.approx(over)
        assert math.isfinite(over)
        assert (over == 0.0) == (plan == "base")
    # The base step reduces every gradient once, dense SAM twice; nothing else is sent but a few numbers.
    for plan, times in (("base", 1.0), ("sam", 2.0)):
        assert rows["ddp", plan]["step_bytes"] == pytest.approx(times * ring_bytes("all_reduce", whole, 2), rel=1e-3)
        reduced = rows["fsdp2", plan]["step_bytes_by_collective"]["reduce_scatter"]
        assert reduced == pytest.approx(times * ring_bytes("reduce_scatter", whole, 2), rel=0.01)
        between = rows["hsdp", plan]["step_bytes_by_collective"]["all_reduce"]
        assert between == pytest.approx(times * ring_bytes("all_reduce", whole / 2, 2), rel=0.01)
    for plan in ("cut 0.5", "norm", "interval 2"):
        row = rows["ddp", plan]
        assert row["ascent_bytes_over_dense"] <= row["density"] + 0.01
        assert rows["fsdp2", plan]["ascent_bytes_over_dense"] < 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "1"], "--ranks is 1; at least 2 are needed"),
        (["--backends", "fsdp"], "there is no backend 'fsdp'; there are ddp, fsdp2, hsdp, zero0"),
        (["--plans", "textbook"], "there is no plan 'textbook'; there are 'base', 'sam'"),
        (["--models", "test_efficientnet"], "EfficientNet has no stages"),
    ],
)
def test_mistakes_are_the_users_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", "bytes", *arguments])
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.err.count("\n") == 1

"""`ssam-scale bench bytes`: what real processes send, what the cost model says that they do, and the least.

Each number of processes starts once and counts for all tests.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from ssam_scale.bench.bytes_sent import Counted, Job, count_bytes, rows_of
from ssam_scale.bench.networks import Setting
from ssam_scale.bench.scenarios import sharded_scenarios
from ssam_scale.cli.main import main
from ssam_scale.costs.cluster import ZeroSettings
from ssam_scale.sharding import World
from ssam_scale.sharding.collectives import ring_bytes
from tests.support.ranks import run_ranks

SETTING = Setting("test_vit", 32, 2, torch.device("cpu"))
BF16 = replace(SETTING, asked="bf16")
# Of stage 3, so that the small network has parameters that are kept gathered and others that are not.
ZERO = ZeroSettings(persistent=5000)

PLANS = ["base", "sam", "cut 0.5", "moving cut", "tensor 50%", "row 50%", "norm", "element 50%", "interval 2"]
PLANS += ["esam", "k-sam", "sam, gap", "sam, open gate", "element 50%, open gate"]
# Savings left out: what the step sends then is predicted all the same.
UNSAVED = ["cut 0.5, no shared prefix", "tensor 50%, not elided", "element 50%, unpacked"]
# Nothing is reduced for them: only what the passes must gather, and weights that each perturbs for itself, is sent.
SENDS_NOTHING = {
    ("ddp", "momentum"),
    ("ddp", "sam, scope worker"),
    ("zero2", "sam, scope worker"),
    ("fsdp2", "momentum"),
}
# What is perturbed, in stages 1 and 2 by each process for itself, is gathered.
PUBLISHED = ["momentum", "friendly", "sam, open gate", "element 50%, open gate"]
ON_WHOLE = {
    "ddp": ["base", "sam", "element 50%", "element 50%, unpacked", "sam, scope worker", "momentum"],
    "fsdp2": ["base", "sam", "cut 0.5", "tensor 50%", "element 50%", "element 50%, unpacked", "momentum", "friendly"],
}
JOBS = [Job(backend, plan) for backend, plans in ON_WHOLE.items() for plan in plans]
JOBS += [Job("fsdp2", "block 50%, kept gathered"), Job("fsdp2", "esam")]
# Stages 0 to 2 all-reduce what an ascent needs by the same code: each plan on one of them. The exhaustive tier has all.
ON_ZERO = {
    "zero1": ["base", "sam", "momentum"],
    "zero2": ["base", "sam", "friendly", "sam, scope worker", "element 50%, open gate"],
    "zero3": ["base", "sam", "cut 0.5", "element 50%", "momentum", "sam, scope micro_batch"],
}
JOBS += [Job(backend, plan) for backend, plans in ON_ZERO.items() for plan in plans]
IN_BF16 = [Job(backend, plan) for backend in ("fsdp2", "zero3") for plan in ("base", "sam", "cut 0.5", "element 50%")]
ON_COPIES = ["base", "sam", "element 50%", "sam, scope shard_group"]


def counted(world: World, jobs: list[Job], setting: Setting = SETTING) -> list[dict[str, Any]]:
    return [vars(counts) for counts in count_bytes(world, setting, jobs, ZERO)]


@pytest.fixture(scope="module")
def found() -> dict[Job, tuple[int, Counted]]:
    copies = [Job("hsdp", plan) for plan in ON_COPIES]
    by_size = {2: JOBS, 4: copies}
    return {
        job: (size, Counted(**counts))
        for size, jobs in by_size.items()
        for job, counts in zip(jobs, run_ranks(size, counted, jobs)[0], strict=True)
    }


@pytest.fixture(scope="module")
def in_bf16() -> dict[Job, Counted]:
    return {
        job: Counted(**counts) for job, counts in zip(IN_BF16, run_ranks(2, counted, IN_BF16, BF16)[0], strict=True)
    }


@pytest.fixture(scope="module")
def rows(found: dict[Job, tuple[int, Counted]]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["backend"], row["plan"]): row for row in rows_of(SETTING, found)}


@pytest.mark.slow
def test_the_cost_model_predicts_the_bytes_of_real_processes(found: dict[Job, tuple[int, Counted]]) -> None:
    """Within half a percent: norms, and whether all processes have the same trace, are a few hundred bytes."""
    for job, (_, counts) in found.items():
        assert counts.predicted == pytest.approx(sum(counts.bytes.values()), rel=0.005), job


@pytest.mark.exhaustive
def test_the_cost_model_predicts_every_plan_on_every_backend() -> None:
    backends = ("ddp", "fsdp2", *(f"zero{stage}" for stage in range(4)))
    jobs = [Job(backend, plan) for backend in backends for plan in PLANS + UNSAVED]
    for job, counts in zip(jobs, run_ranks(2, counted, jobs)[0], strict=True):
        assert counts["predicted"] == pytest.approx(sum(counts["bytes"].values()), rel=0.005), job


@pytest.mark.slow
def test_in_bf16_weights_are_gathered_by_half_the_bytes(
    in_bf16: dict[Job, Counted], found: dict[Job, tuple[int, Counted]]
) -> None:
    """But for what stays float32: norms and position embeddings, and what DeepSpeed gathers of stepped weights.
    Gradients are reduced as they are without, and the cost model says both."""
    for job, counts in in_bf16.items():
        _, float32 = found[job]
        assert counts.predicted == pytest.approx(sum(counts.bytes.values()), rel=0.005), job
        assert counts.bytes["reduce_scatter"] == float32.bytes["reduce_scatter"]
        most = 0.53 if job.backend == "fsdp2" else 0.65
        assert 0.5 < counts.bytes["all_gather"] / float32.bytes["all_gather"] < most, job


@pytest.mark.slow
def test_an_ascent_sends_no_more_than_it_must(rows: dict[tuple[str, str], dict[str, Any]]) -> None:
    for (backend, plan), row in rows.items():
        if plan == "base" or plan in UNSAVED:
            continue
        over, floor = row["ascent_bytes_over_dense"], row["floor_over_dense"]
        if (backend, plan) in SENDS_NOTHING:
            assert floor == 0.0
            assert over < 1e-3  # the norm
            continue
        print(f"{backend}, {plan}: {over:.4f} of dense SAM's, at least {floor:.4f}")
        assert 0.999 * floor <= over <= row["target_over_dense"] == pytest.approx(1.02 * floor), (backend, plan)
        if plan == "sam":
            assert floor == pytest.approx(1.0, rel=0.001)
        if backend in ("ddp", "zero0", "zero1", "zero2") and plan not in PUBLISHED:
            assert floor == pytest.approx(row["density"], rel=0.001), (backend, plan)


@pytest.mark.slow
def test_rows_are_of_steps_and_of_what_ascents_add_to_them(rows: dict[tuple[str, str], dict[str, Any]]) -> None:
    network = SETTING.network()
    whole = 4 * sum(p.numel() for p in network.parameters())
    for (backend, plan), row in rows.items():
        assert row["ranks"] == (4 if backend == "hsdp" else 2)
        assert row["step_bytes"] == pytest.approx(sum(row["step_bytes_by_collective"].values()))
        assert row["ascent_bytes"] == pytest.approx(row["step_bytes"] - rows[backend, "base"]["step_bytes"])
        over = row["ascent_bytes"] / rows[backend, "sam"]["ascent_bytes"]
        assert row["ascent_bytes_over_dense"] == pytest.approx(over)
        assert math.isfinite(over)
        assert (over == 0.0) == (plan == "base") or (backend, plan) in SENDS_NOTHING
    # The base step reduces every gradient once, dense SAM twice; nothing else is sent but a few numbers.
    for plan, times in (("base", 1.0), ("sam", 2.0)):
        assert rows["ddp", plan]["step_bytes"] == pytest.approx(times * ring_bytes("all_reduce", whole, 2), rel=1e-3)
        reduced = rows["fsdp2", plan]["step_bytes_by_collective"]["reduce_scatter"]
        assert reduced == pytest.approx(times * ring_bytes("reduce_scatter", whole, 2), rel=0.01)
        between = rows["hsdp", plan]["step_bytes_by_collective"]["all_reduce"]
        assert between == pytest.approx(times * ring_bytes("all_reduce", whole / 2, 2), rel=0.01)
    # An ascent in ZeRO 1 and 2 publishes nothing: what it adds is one all-reduce.
    for backend in ("zero1", "zero2"):
        ascent = rows[backend, "sam"]["ascent_bytes_by_collective"]
        assert ascent["all_reduce"] == pytest.approx(ring_bytes("all_reduce", whole, 2), rel=1e-3)
        assert ascent["all_gather"] == 0.0
    # What a saving is worth is what its plan is above the floor without it.
    for backend, plan in (("ddp", "element 50%, unpacked"), ("fsdp2", "element 50%, unpacked")):
        assert rows[backend, plan]["ascent_bytes_over_dense"] > 1.1 * rows[backend, plan]["target_over_dense"]


@pytest.mark.slow
def test_the_command_prints_a_row_for_each_backend_and_plan() -> None:
    line = [sys.executable, "-m", "ssam_scale", "bench", "bytes", "--models", "test_vit", "--json"]
    line += ["--plans", "norm", "--backends", "ddp"]
    result = subprocess.run(line, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    rows = {row["plan"]: row for row in json.loads(result.stdout)}
    assert list(rows) == ["base", "sam", "norm"]
    assert rows["norm"]["ascent_bytes_over_dense"] == pytest.approx(rows["norm"]["density"], rel=0.02)


def test_plans_are_those_that_there_are() -> None:
    assert {*PLANS, *UNSAVED, *ON_COPIES} <= {scenario.name for scenario in sharded_scenarios()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "1"], "--ranks is 1; at least 2 are needed"),
        (["--backends", "fsdp"], "there is no backend 'fsdp'; there are ddp, fsdp2, hsdp, zero0"),
        (["--plans", "textbook"], "there is no plan 'textbook'; there are 'base', 'sam'"),
        (["--models", "test_byobnet"], "ByobNet has no stages"),
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

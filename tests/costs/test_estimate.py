"""The cost model of a cluster: properties on made-up networks, and its bytes next to those of real processes."""

from __future__ import annotations

import gc
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssam_scale.bench.bytes_sent import SETUPS
from ssam_scale.bench.networks import Setting
from ssam_scale.bench.scenarios import sharded_scenarios, sparse_sam
from ssam_scale.costs.cluster import Cluster, Placement, ZeroSettings
from ssam_scale.costs.compute import StageTimes, StepShape, StepTimes, base_seconds, predicted_ascent_seconds
from ssam_scale.costs.estimate import Activations, footprint, scaled, step_cost
from ssam_scale.costs.workload import Ascent, Weight, Weights, ascent_of, weights_of
from ssam_scale.masks import BitMask, Plan
from ssam_scale.perturbation import ResolvedStep, StagedModel
from ssam_scale.sharding import World
from ssam_scale.sharding.place import place
from tests.support.ranks import run_ranks
from tests.support.traffic import sent_by

SETTING = Setting("test_vit", 32, 2, torch.device("cpu"))
STAGES = 3
seconds = st.floats(1e-3, 10.0)
stage = st.builds(StageTimes, seconds, seconds, seconds, seconds)
step_times = st.builds(
    StepTimes, st.lists(stage, min_size=STAGES, max_size=STAGES).map(tuple), st.floats(0.0, 1.0), st.floats(0.0, 1e-6)
)
shape = st.lists(st.integers(1, 600), min_size=1, max_size=3).map(tuple)
weight = st.builds(Weight, shape, st.tuples(st.integers(0, STAGES - 1)), st.none() | st.integers(0, STAGES - 1))
some_weights = st.lists(weight, min_size=1, max_size=6).map(lambda ws: {f"w{i}": w for i, w in enumerate(ws)})
bandwidth = st.floats(1e6, 1e12)
backend = st.sampled_from(["ddp", "fsdp2", "zero0", "zero1", "zero2", "zero3"])
gpus = st.sampled_from([1, 2, 4, 8, 64, 512])


@st.composite
def ascents(draw: st.DrawFn) -> tuple[Weights, Ascent]:
    weights = draw(some_weights)
    cut = draw(st.integers(0, STAGES - 1))
    kept = tuple(float(i >= cut) for i in range(STAGES))
    suffix = {name: w.numel for name, w in weights.items() if w.stages[0] >= cut}
    fraction, share, shared = draw(st.floats(0.1, 1.0)), draw(st.floats(0.0, 1.0)), cut > 0 and draw(st.booleans())
    step = StepShape(cut if shared else 0, kept, sum(suffix.values()), fraction)
    plan = Plan(cut, dict.fromkeys(suffix), suffix)
    resolved = ResolvedStep(
        "sparse",
        0,
        plan,
        dict.fromkeys(suffix, 1.0),
        cut=cut,
        shares_prefix=shared,
        computed=suffix,
        reduced=plan.weights,
    )
    return weights, Ascent(share, resolved, step)


@given(step_times, ascents(), backend)
def test_one_gpu_takes_what_one_process_is_predicted_to(
    times: StepTimes, given: tuple[Weights, Ascent], backend: str
) -> None:
    weights, ascent = given
    cost = step_cost(times, weights, [ascent], Placement(backend, 1, Cluster(1, 8, 1e9, 1e8)))  # type: ignore[arg-type]
    expected = base_seconds(times) + ascent.share * predicted_ascent_seconds(times, ascent.shape)
    assert cost.seconds == pytest.approx(expected)
    assert cost.seconds_unhidden == pytest.approx(expected)
    assert cost.bytes == 0.0


@given(step_times, ascents(), backend, gpus, bandwidth, bandwidth, st.floats(1.0, 100.0))
def test_a_faster_link_never_makes_a_step_slower(
    times: StepTimes,
    given: tuple[Weights, Ascent],
    backend: str,
    gpus: int,
    inside: float,
    between: float,
    faster: float,
) -> None:
    weights, ascent = given
    cluster = Cluster(gpus, 8, inside, between)
    slow = step_cost(times, weights, [ascent], Placement(backend, 1, cluster))  # type: ignore[arg-type]
    for better in (
        replace(cluster, node_bandwidth=faster * inside),
        replace(cluster, network_bandwidth=faster * between),
    ):
        fast = step_cost(times, weights, [ascent], Placement(backend, 1, better))  # type: ignore[arg-type]
        assert fast.seconds <= slow.seconds * (1.0 + 1e-9)
        assert fast.seconds_unhidden <= slow.seconds_unhidden * (1.0 + 1e-9)
        assert fast.bytes == slow.bytes
    # Computing alone is the least, and sending everything behind it the most; the two bounds are in order.
    alone = step_cost(
        times,
        weights,
        [ascent],
        Placement(backend, 1, replace(cluster, node_bandwidth=math.inf, network_bandwidth=math.inf)),
    )  # type: ignore[arg-type]
    assert alone.seconds <= slow.seconds * (1.0 + 1e-9)
    assert slow.seconds <= slow.seconds_unhidden * (1.0 + 1e-9)


@given(step_times, st.floats(0.1, 10.0))
def test_more_images_take_longer_in_proportion_but_the_optimizer_does_not(times: StepTimes, images: float) -> None:
    more = scaled(times, images)
    assert base_seconds(more) - more.optimizer == pytest.approx(images * (base_seconds(times) - times.optimizer))
    assert (more.optimizer, more.perturb) == (times.optimizer, times.perturb)


@given(ascents(), gpus, gpus)
def test_fsdp2_holds_a_share_and_ddp_everything(given: tuple[Weights, Ascent], few: int, many: int) -> None:
    weights, ascent = given
    whole = 4 * sum(w.numel for w in weights.values())

    def on(backend: str, gpus: int) -> float:
        placement = Placement(backend, 1, Cluster(gpus, 8, 1e9, 1e9))  # type: ignore[arg-type]
        return footprint(weights, [ascent], placement, 8.0, Activations(1.0, 2.0), 3.0).weights

    assert on("ddp", few) == on("ddp", many) == whole
    assert on("fsdp2", 1) == whole
    # A row is the least that a process holds of a parameter.
    for gpus in (few, many):
        assert (
            whole / gpus
            <= on("fsdp2", gpus)
            < whole / gpus + 4 * sum(math.prod(w.shape[1:]) for w in weights.values()) + 1e-6
        )


def test_a_footprint_by_hand() -> None:
    weights = {"stem": Weight((10, 3), (0,), None), "a": Weight((8, 4), (0,), 0), "b": Weight((8, 4), (1,), 1)}
    plan = Plan(0, {"a": None, "b": BitMask(torch.tensor([255, 127, 0, 0], dtype=torch.uint8), 32)}, {"a": 32, "b": 15})
    half = Ascent(1.0, ResolvedStep("sparse", 0, plan, {"a": 1.0, "b": 1.0}), StepShape(0, (1.0, 1.0), 47))
    ddp = footprint(weights, [half], Placement("ddp", 1, Cluster(4, 8, 1.0, 1.0)), 8.0, Activations(5.0, 100.0), 2.0)
    # 94 weights; gradients and DDP's buckets; a backup and ε of 47 weights; a bit a weight.
    assert (ddp.weights, ddp.gradients, ddp.optimizer, ddp.gathered) == (376.0, 752.0, 752.0, 0.0)
    assert (ddp.mask, ddp.perturbation, ddp.activations) == (94 / 8, 376.0, 205.0)
    fsdp = footprint(weights, [], Placement("fsdp2", 1, Cluster(4, 8, 1.0, 1.0)), 8.0, Activations(0.0, 0.0), 2.0)
    # The stem's ten rows are padded to twelve: nine elements here; gathered: all of it, both blocks, one gradient.
    assert fsdp.weights == fsdp.gradients == 4 * (9 + 8 + 8)
    assert fsdp.gathered == 4 * (36 + 32 + 32 + 36)
    assert (fsdp.mask, fsdp.perturbation) == (0.0, 0.0)
    settings = ZeroSettings(reduce_bucket=100, persistent=0, reuse=60, prefetch=5)
    on_zero = [Placement(backend, 1, Cluster(4, 8, 1.0, 1.0), settings) for backend in ("zero2", "zero3")]  # type: ignore[arg-type]
    two, three = (footprint(weights, [half], s, 8.0, Activations(0.0, 0.0), 2.0) for s in on_zero)
    # The flat buffer is padded to 96, of which a quarter is stepped, in a copy; a bucket of 100.
    assert (two.weights, two.gradients, two.optimizer) == (4 * (96 + 24), 4 * (24 + 100), 8 * 24)
    # Each process perturbs and puts back all, and knows the mask of all and of its part.
    assert (two.mask, two.perturbation) == ((24 + 94) / 8, 4 * (47 + 47))
    assert (three.weights, three.gradients, three.optimizer) == (4 * 2 * 24, 4 * (24 + 100), 8 * 24)
    # Between the two passes of the first stage lie 64 elements: it is freed, but for the largest and what is fetched.
    assert three.gathered == 4 * (32 + 32 + 5)
    assert three.perturbation == 4 * 2 * 47 / 4


SAME_EVERYWHERE = [
    "base",
    "sam",
    "cut 0.25",
    "cut 0.75",
    "cut 0.5, no shared prefix",
    "tensor 50%",
    "block 50%",
    "norm",
]
# Packed values of rows and of single weights are the backend's to send; whole ones are the same everywhere.
SAME_EVERYWHERE += ["element 50%, unpacked", "row 50%, unpacked", "tensor 50%, not elided"]
ON_ZERO = ["base", "sam", "cut 0.75", "tensor 50%", "element 50%"]
# Of stage 3, so that the small network has parameters that are kept gathered and others that are not.
SMALL = 5000

JOBS = [(backend, plan) for backend in ("ddp", "fsdp2") for plan in SAME_EVERYWHERE]
JOBS += [("fsdp2", "element 50%"), ("fsdp2", "block 50%, kept gathered")]
JOBS += [(f"zero{stage}", plan) for stage in range(4) for plan in ON_ZERO]
ON_COPIES = ["sam", "element 50%", "block 50%, kept gathered", "sam, within the shard group"]


def _two_groups(network: StagedModel) -> torch.optim.Optimizer:
    """As timm's factory makes them: weight decay for matrices alone. ZeRO has a flat buffer for each."""
    groups = [[p for p in network.parameters() if (p.ndim > 1) == matrix] for matrix in (True, False)]
    return torch.optim.SGD([{"params": group} for group in groups], lr=1e-3, momentum=0.9)


def _counted_and_predicted(world: World, jobs: list[tuple[str, str]]) -> dict[str, tuple[float, float]]:
    """Of each backend and plan: bytes counted in a step, and predicted."""
    known = {scenario.name: scenario for scenario in sharded_scenarios()}
    times = StepTimes((StageTimes(1.0, 2.0, 1.0, 1.0),) * len(SETTING.network().stages), 0.0, 0.0)
    found = {}
    for backend, plan in jobs:
        network, batch, spread = SETTING.network(), SETTING.batch(), SETUPS[backend]
        weights = weights_of(network, _two_groups(network))
        zero = {"zero_optimization": {"stage3_param_persistence_threshold": SMALL}}
        module, base = place(
            network,
            [stage.block for stage in network.stages],
            spread.backend,
            world,
            partial(_two_groups, network),
            replicas=spread.replicas,
            batch_size=SETTING.batch_size,
            deepspeed=zero if backend.startswith("zero") else None,
        )
        opt = sparse_sam(module, base, known[plan])
        for _ in range(3):  # DDP settles its buckets in the first, and stage 3 its traces in two of each kind of pass
            opt.step(SETTING.loss_fn, batch)
        counted = sum(sent_by(partial(opt.step, SETTING.loss_fn, batch)).bytes.values())
        one = SETTING.network()
        alone = sparse_sam(one, _two_groups(one), known[plan])
        ascent = ascent_of(alone.resolve(dense=False), weights, len(one.stages))
        placement = Placement(
            spread.backend, spread.replicas, Cluster(world.size, 8, 1e9, 1e9), ZeroSettings(persistent=SMALL)
        )
        found[f"{backend}, {plan}"] = counted, step_cost(times, weights, [ascent], placement).bytes
        del opt, module, base, network
        gc.collect()
    return found


def _compare(found: dict[str, tuple[float, float]]) -> None:
    """Within half a percent: norms, and whether all processes have the same trace, are a few hundred bytes."""
    for what, (counted, predicted) in found.items():
        assert predicted == pytest.approx(counted, rel=0.005), what


@pytest.mark.slow
def test_bytes_are_those_of_real_processes() -> None:
    _compare(run_ranks(2, _counted_and_predicted, JOBS)[0])


@pytest.mark.slow
def test_bytes_of_several_copies_are_those_of_real_processes() -> None:
    _compare(run_ranks(4, _counted_and_predicted, [("hsdp", plan) for plan in ON_COPIES])[0])

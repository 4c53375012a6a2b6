"""The cost model of a cluster: properties on made-up networks. Its bytes meet real ones in `bench/test_bytes_sent`."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssam_scale.costs.backends import PassTraffic, costs_of
from ssam_scale.costs.cluster import Cluster, Placement, ZeroSettings
from ssam_scale.costs.compute import StageTimes, StepShape, StepTimes, base_seconds, predicted_ascent_seconds
from ssam_scale.costs.estimate import Activations, footprint, step_cost
from ssam_scale.costs.workload import Ascent, Weight, Weights
from ssam_scale.masks import BitMask, Plan
from ssam_scale.perturbation import Fresh, Friendly, ResolvedStep

STAGES = 3
seconds = st.floats(1e-3, 10.0)
stage = st.builds(StageTimes, seconds, seconds, seconds, seconds)
step_times = st.builds(
    StepTimes.proportional,
    st.lists(stage, min_size=STAGES, max_size=STAGES).map(tuple),
    st.floats(0.0, 1.0),
    st.floats(0.0, 1e-6),
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
    frozen = draw(st.lists(st.sampled_from(list(weights)), max_size=len(weights) - 1))
    weights = {name: replace(w, trained=name not in frozen) for name, w in weights.items()}
    suffix = {name: w.numel for name, w in weights.items() if w.stages[0] >= cut and w.trained}
    kept = tuple(float(any(weights[name].stages[0] == i for name in suffix)) for i in range(STAGES))
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


def sent(*passes: PassTraffic) -> float:
    return sum(each.bytes for traffic in passes for each in (*traffic.forward, *traffic.backward, *traffic.after))


@given(ascents(), backend, gpus, st.sampled_from([0, 10**9]), st.integers(1, 3))
def test_no_ascent_is_predicted_to_send_less_than_the_floor_and_dense_sams_sends_that(
    given: tuple[Weights, Ascent], backend: str, gpus: int, reuse: int, accumulation: int
) -> None:
    weights, ascent = given
    settings = ZeroSettings(reuse=reuse, persistent=0)
    costs = costs_of(weights, Placement(backend, 1, Cluster(gpus, 8, 1e9, 1e8), settings), accumulation)

    def added(ascent: Ascent) -> float:
        return sent(costs.ascent(ascent), costs.descent(ascent)) - sent(costs.descent(None))

    def floor(ascent: Ascent) -> float:
        return sum(each.bytes for each in costs.floor(ascent))

    assert floor(ascent) <= added(ascent) * (1.0 + 1e-9) + 1e-3
    counts = {name: w.numel for name, w in weights.items() if w.trained}
    plan = Plan(0, dict.fromkeys(counts), counts)
    resolved = ResolvedStep("sparse", 0, plan, dict.fromkeys(counts, 1.0), computed=counts, reduced=plan.weights)
    dense = Ascent(1.0, resolved, StepShape(0, (1.0,) * STAGES, sum(counts.values())))
    assert floor(dense) == pytest.approx(added(dense))
    assert floor(ascent) <= floor(dense) * (1.0 + 1e-9)


@given(step_times, st.floats(0.1, 10.0))
def test_more_images_take_longer_in_proportion_but_the_optimizer_does_not(times: StepTimes, images: float) -> None:
    more = replace(times, images=images * times.images)
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


@pytest.mark.parametrize(
    ("backend", "shards"),
    [("single", 1), ("ddp", 1), ("fsdp2", 4), ("zero0", 1), ("zero1", 4), ("zero2", 4), ("zero3", 4)],
)
def test_what_is_kept_through_the_descent_takes_four_bytes_a_perturbed_weight_of_a_shard(
    backend: str, shards: int
) -> None:
    weights = {"a": Weight((16, 4), (0,), 0), "b": Weight((16, 8), (1,), 1)}
    plan = Plan(1, {"b": None}, {"b": 128})
    gpus = 1 if backend == "single" else 4
    placement = Placement(backend, 1, Cluster(gpus, 8, 1.0, 1.0))  # type: ignore[arg-type]

    def reuse(keeps: bool, remembers: bool = False, reuses: float = 0.0) -> float:
        direction = Friendly() if remembers else Fresh()
        resolved = ResolvedStep("sparse", 0, plan, {"b": 1.0}, direction=direction, keeps=keeps)
        ascent = Ascent(1.0, resolved, StepShape(1, (0.0, 1.0), 128), reuses=reuses)
        return footprint(weights, [ascent], placement, 8.0, Activations(0.0, 0.0), 2.0).reuse

    mine = 4 * 128 / shards
    assert (reuse(False), reuse(True), reuse(False, remembers=True)) == (0.0, mine, mine)
    # GSAM's ε beside a mean of gradients, and LookSAM's beside what its last ascent has left.
    assert reuse(True, remembers=True) == reuse(True, reuses=4.0) == reuse(False, reuses=4.0) == 2 * mine


def test_a_footprint_by_hand() -> None:
    weights = {"stem": Weight((10, 3), (0,), None), "a": Weight((8, 4), (0,), 0), "b": Weight((8, 4), (1,), 1)}
    plan = Plan(0, {"a": None, "b": BitMask(torch.tensor([255, 127, 0, 0], dtype=torch.uint8), 32)}, {"a": 32, "b": 15})
    half = Ascent(1.0, ResolvedStep("sparse", 0, plan, {"a": 1.0, "b": 1.0}), StepShape(0, (1.0, 1.0), 47))
    ddp = footprint(weights, [half], Placement("ddp", 1, Cluster(4, 8, 1.0, 1.0)), 8.0, Activations(5.0, 100.0), 2.0)
    # 94 weights; gradients and DDP's buckets; a backup of 47 weights; a bit a weight.
    assert (ddp.weights, ddp.gradients, ddp.optimizer, ddp.gathered) == (376.0, 752.0, 752.0, 0.0)
    assert (ddp.mask, ddp.perturbation, ddp.activations) == (94 / 8, 188.0, 205.0)
    fsdp = footprint(weights, [], Placement("fsdp2", 1, Cluster(4, 8, 1.0, 1.0)), 8.0, Activations(0.0, 0.0), 2.0)
    # The stem's ten rows are padded to twelve: nine elements here; gathered: all of it, both blocks, one gradient.
    assert fsdp.weights == fsdp.gradients == 4 * (9 + 8 + 8)
    assert fsdp.gathered == 4 * (36 + 32 + 32 + 36)
    assert (fsdp.mask, fsdp.perturbation) == (0.0, 0.0)
    # In bf16 the blocks' weights are cast before they are gathered, and autocast's copies, among the 150 bytes that
    # were measured, are not there; the gradient is float32.
    cast = {name: w if name == "stem" else replace(w, gathered=2) for name, w in weights.items()}
    bf16 = footprint(cast, [], Placement("fsdp2", 1, Cluster(4, 8, 1.0, 1.0)), 8.0, Activations(150.0, 100.0), 2.0)
    assert (bf16.weights, bf16.gradients) == (fsdp.weights, fsdp.gradients)
    assert bf16.gathered == 4 * 36 + 2 * (32 + 32) + 4 * 36
    assert bf16.activations == 150 - 2 * (32 + 32) + 200
    settings = ZeroSettings(reduce_bucket=100, persistent=0, reuse=60, prefetch=5)
    on_zero = [Placement(backend, 1, Cluster(4, 8, 1.0, 1.0), settings) for backend in ("zero2", "zero3")]  # type: ignore[arg-type]
    two, three = (footprint(weights, [half], s, 8.0, Activations(0.0, 0.0), 2.0) for s in on_zero)
    # The flat buffer is padded to 96, of which a quarter is stepped, in a copy; a bucket of 100.
    assert (two.weights, two.gradients, two.optimizer) == (4 * (96 + 24), 4 * (24 + 100), 8 * 24)
    # Each process perturbs and puts back all, and knows the mask of all and of its part.
    assert (two.mask, two.perturbation) == ((24 + 94) / 8, 4 * 47)
    assert (three.weights, three.gradients, three.optimizer) == (4 * 2 * 24, 4 * (24 + 100), 8 * 24)
    # Between the two passes of the first stage lie 64 elements: it is freed, but for the largest and what is fetched.
    assert three.gathered == 4 * (32 + 32 + 5)
    assert three.perturbation == 4 * 47 / 4

"""The cost model of a cluster: properties on made-up networks, and its bytes next to those of real processes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssam_scale.bench.cluster import Cluster, Spreading
from ssam_scale.bench.cost import Ascent, Weight, Weights, scaled, step_cost
from ssam_scale.bench.footprint import Activations, footprint
from ssam_scale.bench.networks import Setting
from ssam_scale.bench.plans import spread_ways
from ssam_scale.bench.predict import StageTimes, StepShape, StepTimes, ascent_seconds, base_seconds
from ssam_scale.bench.shapes import ascent_of, weights_of
from ssam_scale.bench.traffic import sent_by
from ssam_scale.bench.wire import SPREADS, placed
from ssam_scale.sharding import World
from tests.support.ranks import run_ranks

SETTING = Setting("test_vit", 32, 2, torch.device("cpu"))
STAGES = 3
seconds = st.floats(1e-3, 10.0)
stage = st.builds(StageTimes, seconds, seconds, seconds, seconds)
step_times = st.builds(
    StepTimes, st.lists(stage, min_size=STAGES, max_size=STAGES).map(tuple), st.floats(0.0, 1.0), st.floats(0.0, 1e-6)
)
shape = st.lists(st.integers(1, 600), min_size=1, max_size=3).map(tuple)
weight = st.builds(Weight, shape, st.integers(0, STAGES - 1), st.none() | st.integers(0, STAGES - 1))
some_weights = st.lists(weight, min_size=1, max_size=6).map(lambda ws: {f"w{i}": w for i, w in enumerate(ws)})
bandwidth = st.floats(1e6, 1e12)
backend = st.sampled_from(["ddp", "fsdp2"])
gpus = st.sampled_from([1, 2, 4, 8, 64, 512])


@st.composite
def ascents(draw: st.DrawFn) -> tuple[Weights, Ascent]:
    weights = draw(some_weights)
    cut = draw(st.integers(0, STAGES - 1))
    kept = tuple(float(i >= cut) for i in range(STAGES))
    reduced = {name: w.numel for name, w in weights.items() if w.stage >= cut}
    fraction, share, shared = draw(st.floats(0.1, 1.0)), draw(st.floats(0.0, 1.0)), cut > 0 and draw(st.booleans())
    step = StepShape(cut if shared else 0, kept, sum(reduced.values()), fraction)
    return weights, Ascent(share, step, reduced, reduced, shares_prefix=shared)


@given(step_times, ascents(), backend)
def test_one_gpu_takes_what_one_process_is_predicted_to(
    times: StepTimes, given: tuple[Weights, Ascent], backend: str
) -> None:
    weights, ascent = given
    cost = step_cost(times, weights, [ascent], Spreading(backend, 1, Cluster(1, 8, 1e9, 1e8)))  # type: ignore[arg-type]
    expected = base_seconds(times) + ascent.share * ascent_seconds(times, ascent.shape)
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
    slow = step_cost(times, weights, [ascent], Spreading(backend, 1, cluster))  # type: ignore[arg-type]
    for better in (
        replace(cluster, node_bandwidth=faster * inside),
        replace(cluster, network_bandwidth=faster * between),
    ):
        fast = step_cost(times, weights, [ascent], Spreading(backend, 1, better))  # type: ignore[arg-type]
        assert fast.seconds <= slow.seconds * (1.0 + 1e-9)
        assert fast.seconds_unhidden <= slow.seconds_unhidden * (1.0 + 1e-9)
        assert fast.bytes == slow.bytes
    # Computing alone is the least, and sending everything behind it the most; the two bounds are in order.
    alone = step_cost(
        times,
        weights,
        [ascent],
        Spreading(backend, 1, replace(cluster, node_bandwidth=math.inf, network_bandwidth=math.inf)),
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
        spreading = Spreading(backend, 1, Cluster(gpus, 8, 1e9, 1e9))  # type: ignore[arg-type]
        return footprint(weights, [ascent], spreading, 8.0, Activations(1.0, 2.0), 3.0).weights

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
    weights = {"stem": Weight((10, 3), 0, None), "a": Weight((8, 4), 0, 0), "b": Weight((8, 4), 1, 1)}
    half = Ascent(1.0, StepShape(0, (1.0, 1.0), 47), {}, {"a": 32, "b": 15}, partly=True, singly=True)
    ddp = footprint(weights, [half], Spreading("ddp", 1, Cluster(4, 8, 1.0, 1.0)), 8.0, Activations(5.0, 100.0), 2.0)
    # 94 weights; gradients and DDP's buckets; a backup and ε of 47 weights; a bit a weight.
    assert (ddp.weights, ddp.gradients, ddp.optimizer, ddp.gathered) == (376.0, 752.0, 752.0, 0.0)
    assert (ddp.mask, ddp.perturbation, ddp.activations) == (94 / 8, 376.0, 205.0)
    fsdp = footprint(weights, [], Spreading("fsdp2", 1, Cluster(4, 8, 1.0, 1.0)), 8.0, Activations(0.0, 0.0), 2.0)
    # The stem's ten rows are padded to twelve: nine elements here; gathered: all of it, both blocks, one gradient.
    assert fsdp.weights == fsdp.gradients == 4 * (9 + 8 + 8)
    assert fsdp.gathered == 4 * (36 + 32 + 32 + 36)
    assert (fsdp.mask, fsdp.perturbation) == (0.0, 0.0)


PLANS = ["base", "sam", "cut 0.25", "cut 0.75", "cut 0.5, no shared prefix", "tensor 50%", "block 50%", "norm"]
# Packed values of rows and of single weights are the backend's to send; whole ones are the same everywhere.
PLANS += ["element 50%, unpacked", "row 50%, unpacked"]


def _measured(world: World) -> dict[str, tuple[float, float]]:
    """Of each backend and plan: bytes counted in a step, and predicted."""
    known = {way.name: way for way in spread_ways()}
    weights = weights_of(SETTING.network())
    times = StepTimes((StageTimes(1.0, 2.0, 1.0, 1.0),) * len(SETTING.network().stages), 0.0, 0.0)
    found = {}
    for name in ("ddp", "fsdp2"):
        for plan in PLANS:
            opt, batch = placed(SETTING, SPREADS[name], world, known[plan]), SETTING.batch()
            for _ in range(2):  # DDP settles its buckets in the first
                opt.step(SETTING.loss_fn, batch)
            counted = sum(sent_by(lambda opt=opt, batch=batch: opt.step(SETTING.loss_fn, batch)).bytes.values())  # type: ignore[misc]
            spreading = Spreading(name, 1, Cluster(world.size, 8, 1e9, 1e9))  # type: ignore[arg-type]
            ascent = ascent_of(opt, weights, dense=False, shares_prefix=opt.levers.share_prefix)
            found[f"{name}, {plan}"] = counted, step_cost(times, weights, [ascent], spreading).bytes
            del opt
    return found


@pytest.mark.slow
def test_bytes_are_those_of_real_processes() -> None:
    """Within one percent, which the sums of norms are far below."""
    for what, (counted, predicted) in run_ranks(2, _measured)[0].items():
        assert predicted == pytest.approx(counted, rel=0.01), what

"""What ZeRO's stage 3 gathers: no more than a pass needs, and nothing that has changed since."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from ssam_scale import Depth, Scored, SparseSAM
from ssam_scale.masks import Dense, Mask
from ssam_scale.perturbation import Savings
from ssam_scale.sharding import World
from ssam_scale.sharding.collectives import Traffic
from ssam_scale.sharding.place import place
from ssam_scale.sharding.zero import stage3
from tests.support.networks import batches, freeze_batchnorm, loss_fn, part, small_network
from tests.support.ranks import run_ranks
from tests.support.training import BATCH, Case, check, train

pytestmark = pytest.mark.slow

# DeepSpeed keeps parameters of at most so many elements gathered between passes: none or all of these.
THRESHOLDS = (0, 100_000)
MARGIN = 0.01
# Each block is a twentieth to a fifth of all; a pass that gathers a weight twice is far above the margin.
CUTS = Depth((0.25, 0.75), seed=3)


@dataclass(frozen=True)
class Sent:
    """What a process sent in one step, and whether each gathered copy that a pass found was of the shard as it was."""

    cut: int
    density: float
    bytes: float
    recordings: int
    fresh: bool


def steps_of(
    world: World, threshold: int, mask: Mask | None, steps: int, savings: Savings | None = None, micro: int = 1
) -> list[Sent]:
    model = freeze_batchnorm(small_network("vit"))
    placed, base = place(
        model,
        [],
        "zero3",
        world,
        lambda: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        batch_size=BATCH // world.size // micro,
        accumulation=micro,
        deepspeed={"zero_optimization": {"stage3_param_persistence_threshold": threshold}},
    )
    opt = SparseSAM(placed, base, rho=0.5 if mask is not None else 0.0, mask=mask, savings=savings)
    if isinstance(mask, Scored):
        opt.refresh()
    own = part(batches(1, BATCH)[0], world.rank, world.size)
    every: list[Any] = list(model.parameters())
    fresh: list[bool] = []

    def look() -> None:
        for p, shard in zip(every, opt.sharding.shards(every), strict=True):
            if p.ds_status.name == "AVAILABLE":
                copy = p.detach().reshape(-1)[shard.start : shard.start + shard.weight.numel()]
                fresh.append(torch.equal(copy, shard.weight))

    def looking(forward: Any, batch: Any) -> Tensor:
        look()
        loss = loss_fn(forward, batch)
        look()
        return loss

    result = []
    for _ in range(steps):
        plan, density = opt.plan, opt.density
        with Traffic() as traffic:
            opt.step(looking, *(part(own, i, micro) for i in range(micro)))
        # While DeepSpeed records, and at no other time, the processes compare their traces, which are broadcast.
        result.append(Sent(plan.cut, density, sum(traffic.bytes.values()), traffic.calls["broadcast"], all(fresh)))
    assert fresh
    return result


def two_ranks(world: World) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for threshold in THRESHOLDS:
        found[f"base {threshold}"] = steps_of(world, threshold, None, 3)
        found[f"dense {threshold}"] = steps_of(world, threshold, Dense(), 3)
        found[f"cut {threshold}"] = steps_of(world, threshold, Depth((0.5, 0.5)), 4)
        found[f"moving {threshold}"] = steps_of(world, threshold, CUTS, 8)
        found[f"kept {threshold}"] = steps_of(
            world, threshold, Scored("tensor", 0.5, score="random"), 3, Savings(keep_gathered=True)
        )
    found["accumulated"] = steps_of(world, 300, CUTS, 8, micro=2)
    result: dict[str, Any] = {name: [vars(step) for step in steps] for name, steps in found.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage3, "_MAX_TRACES", 2)  # fewer than one step has
        return result | {"few": train(world, "zero3", FEW_KINDS)}


FEW_KINDS = [
    Case("vit", "moving cut"),
    Case("vit", "block", savings=Savings(keep_gathered=True, pack=False)),
    Case("resnet", "tensor", savings=Savings(keep_gathered=True, share_prefix=False), accumulation=2),
]


@pytest.fixture(scope="module")
def two() -> list[dict[str, Any]]:
    ranks = run_ranks(2, two_ranks)
    return [{k: v if k == "few" else [Sent(**step) for step in v] for k, v in rank.items()} for rank in ranks]


def over_dense(found: dict[str, Any], plan: str, threshold: int) -> list[float]:
    """Of each step, the bytes of its ascent over those of dense SAM's; settled ones of the others."""
    base, dense = (found[f"{name} {threshold}"][-1].bytes for name in ("base", "dense"))
    return [(step.bytes - base) / (dense - base) for step in found[f"{plan} {threshold}"]]


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_a_fixed_cuts_ascent_sends_its_density_of_dense_sams_and_nothing_is_recorded_anew(
    two: Any, threshold: int
) -> None:
    steps, ratios = two[0][f"cut {threshold}"], over_dense(two[0], "cut", threshold)
    print(f"zero3, {threshold}: density {steps[0].density:.3f}, ascent over dense {ratios}")
    # The second step sends the recorded order of some hundred numbers to compare, which of a tiny network is a little.
    assert all(ratio <= steps[0].density + (0.04 if i == 1 else MARGIN) for i, ratio in enumerate(ratios) if i)
    assert [bool(step.recordings) for step in steps] == [True, True, False, False]


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_a_moving_cuts_ascent_sends_its_density_of_dense_sams_once_a_cut_was_seen_twice(
    two: Any, threshold: int
) -> None:
    steps, ratios = two[0][f"moving {threshold}"], over_dense(two[0], "moving", threshold)
    seen = [sum(before.cut == step.cut for before in steps[:i]) for i, step in enumerate(steps)]
    settled = [i for i, times in enumerate(seen) if times >= 2]
    assert len({steps[i].cut for i in settled}) > 1  # cuts take turns, or there were nothing to see
    for i in settled:
        assert ratios[i] <= steps[i].density + MARGIN
        assert steps[i].recordings == 0


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_tensors_left_alone_are_not_gathered_again_where_they_are_kept(two: Any, threshold: int) -> None:
    steps, ratios = two[0][f"kept {threshold}"], over_dense(two[0], "kept", threshold)
    assert ratios[-1] <= steps[-1].density + MARGIN
    assert steps[-1].recordings == 0


def test_no_pass_finds_a_gathered_copy_of_what_has_changed(two: Any) -> None:
    for rank in two:
        assert all(step.fresh for name, steps in rank.items() if name != "few" for step in steps)


def test_with_accumulation_nothing_is_recorded_anew_either(two: Any) -> None:
    steps = two[0]["accumulated"]
    seen = [sum(before.cut == step.cut for before in steps[:i]) for i, step in enumerate(steps)]
    assert sum(times >= 2 for times in seen) > 2
    assert not any(step.recordings for step, times in zip(steps, seen, strict=True) if times >= 2)


def test_kinds_of_passes_that_are_forgotten_are_recorded_anew_and_change_nothing(two: Any) -> None:
    check(FEW_KINDS, [rank["few"] for rank in two], "zero3")

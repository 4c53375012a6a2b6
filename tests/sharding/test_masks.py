"""Every mask is the same, bit for bit, on every backend and number of processes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ssam_scale.masks import NM, Dynamic, ScoreBased, Scored
from ssam_scale.perturbation import SparseSAM
from ssam_scale.sharding import World
from ssam_scale.sharding.place import place
from tests.support.masks import whole_mask
from tests.support.networks import batches, freeze_batchnorm, loss_fn, part, small_network
from tests.support.ranks import alone, run_ranks

BATCH, SAMPLES = 12, 5  # 12 divides over 1 to 4 processes, 5 samples over none but one
# All of this is the same on all of these with 1, 2, 3 and 4 processes; to save time, some of it has been left out.
WORK = {
    1: [("ddp", "vit"), ("zero1", "vit"), ("zero3", "vit")],
    2: [("ddp", "vit"), ("fsdp2", "resnet"), ("zero2", "vit")],
    3: [("zero0", "vit"), ("ddp", "vit"), ("zero3", "resnet")],
    4: [("fsdp2", "vit"), ("zero1", "resnet")],
}
MASKS: dict[str, Callable[[], ScoreBased]] = {
    "element fisher": lambda: Scored("element", 0.5),
    "element gradient, uniform": lambda: Scored("element", 0.8, score="gradient", allocation="uniform"),
    "element random, erk": lambda: Scored("element", 0.7, score="random", allocation="erk", seed=5),
    "row random": lambda: Scored("row", 0.5, score="random", seed=5),
    "tensor random": lambda: Scored("tensor", 0.4, score="random", seed=5),
    "block random, each by itself": lambda: Scored("block", 0.5, score="random", seed=5, independent=True),
    "row fisher": lambda: Scored("row", 0.6),
    "row weight, uniform": lambda: Scored("row", 0.4, score="weight", allocation="uniform"),
    "tensor fisher": lambda: Scored("tensor", 0.7),
    "block fisher": lambda: Scored("block", 0.5),
    "2:4 fisher": lambda: NM(2, 4, indivisible="perturbed"),
    "1:8 weight": lambda: NM(1, 8, score="weight", others="unperturbed", indivisible="unperturbed"),
    "dynamic": lambda: Dynamic(0.5, steps=10),
    "dynamic, dense": lambda: Dynamic(0.1, steps=10, drop="weight", grow="fisher"),
}


def hashes(world: World, backend: Any, family: str) -> dict[str, str]:
    """Of every mask, what it chooses, a dynamic one three times, and how much of that is new."""
    model = freeze_batchnorm(small_network(family))
    module, base = place(
        model,
        [stage.block for stage in model.stages],
        backend,
        world,
        lambda: torch.optim.SGD(model.parameters(), lr=0.1),
        batch_size=BATCH // world.size,
    )
    batch = part(batches(1, BATCH, seed=7)[0], world.rank, world.size)
    result = {}
    for name, make in MASKS.items():
        opt = SparseSAM(module, base, mask=make())
        digest = hashlib.sha256()
        for refresh in range(3 if isinstance(opt.mask, Dynamic) else 1):
            opt.steps = refresh
            opt.refresh(loss_fn, batch, samples=SAMPLES)
            for parameter, mask in whole_mask(opt).items():
                digest.update(parameter.encode() + mask.contiguous().view(torch.uint8).numpy().tobytes())
            digest.update(f"{opt.plan.counts} {opt.mask.turnover}".encode())
        result[name] = digest.hexdigest()[:16]
    return result


def everywhere(world: World, work: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [hashes(world, backend, family) for backend, family in work]


BACKENDS = ("ddp", "fsdp2", "zero0", "zero1", "zero2", "zero3")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "work"),
    [
        *WORK.items(),
        pytest.param(3, [(backend, "vit") for backend in BACKENDS], marks=pytest.mark.exhaustive),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else "-".join(backend for backend, _ in value),
)
def test_masks_depend_neither_on_the_backend_nor_on_the_number_of_processes(
    size: int, work: list[tuple[str, str]]
) -> None:
    expected = {family: alone(hashes, "single", family) for family in {family for _, family in work}}
    for family in expected.values():
        assert len(set(family.values())) == len(MASKS)
    for rank in run_ranks(size, everywhere, work):
        for (backend, family), result in zip(work, rank, strict=True):
            assert result == expected[family], (backend, family)
    for family, digests in expected.items():  # pytest -s
        print(f"\n{family} on {size} × {', '.join(b for b, f in work if f == family)}: as on one process")
        for name, digest in digests.items():
            print(f"  {name:28} {digest}")

"""Whose batch an ascent is by: each scope equals the slow reference of the same scope, on every backend that has it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from ssam_scale import Fresh, Norms, SparseSAM
from ssam_scale.perturbation.reference import first_samples, reference_step
from ssam_scale.sharding import World
from ssam_scale.sharding.collectives import Traffic
from ssam_scale.sharding.place import place
from tests.support.networks import batches, loss_fn, part, small_network
from tests.support.ranks import alone, run_ranks
from tests.support.tiers import few
from tests.support.training import BATCH, CLIP, RHO, STEPS, TOLERANCE, Case, train

WORKER, BY_MICRO_BATCH, IN_GROUP = (Fresh(scope=scope) for scope in ("worker", "micro_batch", "shard_group"))
ON_REPLICAS = [
    Case("vit", "dense", direction=WORKER),
    Case("vit", "element", direction=WORKER, accumulation=2),
    Case("resnet", "moving cut", direction=Fresh(0.5, scope="worker"), optimizer="adamw"),
]
IN_PARTS = [
    Case("vit", "element", direction=BY_MICRO_BATCH, accumulation=2),
    Case("vit", "moving cut", direction=BY_MICRO_BATCH, accumulation=3),  # whose prefix both passes share
    Case("resnet", "dense", direction=BY_MICRO_BATCH, accumulation=2, optimizer="adamw"),
]


def joined(pieces: list[Any]) -> tuple[Tensor, Tensor]:
    images, labels = zip(*pieces, strict=True)
    return torch.cat(images), torch.cat(labels)


def parts_of(case: Case, batch: Any, ranks: int, sharers: int) -> list[Any]:
    """What climbs by itself: micro-batches, or all of them, of ranks that share one copy of the weights."""
    own = [[part(part(batch, r, ranks), i, case.accumulation) for i in range(case.accumulation)] for r in range(ranks)]
    groups = [own[first : first + sharers] for first in range(0, ranks, sharers)]
    if case.direction == BY_MICRO_BATCH:
        return [joined([rank[i] for rank in group]) for group in groups for i in range(case.accumulation)]
    return [joined([piece for rank in group for piece in rank]) for group in groups]


def expected(case: Case, masks: list[Any], ranks: int, sharers: int) -> dict[str, Tensor]:
    model = case.make_model().model
    optimizer = case.make_optimizer(model)
    assert isinstance(case.direction, Fresh)
    for batch, mask in zip(batches(STEPS, BATCH), masks, strict=True):
        alone = []
        for piece in parts_of(case, batch, ranks, sharers):
            first = first_samples(len(piece[0]), case.direction.fraction)
            alone.append(((piece[0][:first], piece[1][:first]), piece))
        reference_step(
            model,
            optimizer,
            case.loss_fn,
            batch,
            rho=RHO,
            mask=mask,
            norm="masked",
            max_grad_norm=CLIP,
            alone=alone,
        )
    return {name: p.detach() for name, p in model.named_parameters()}


def check(cases: list[Case], ranks: list[Any], sharers: int) -> None:
    for index, case in enumerate(cases):
        weights = expected(case, ranks[0][index]["masks"], len(ranks), sharers)
        together = expected(case, ranks[0][index]["masks"], len(ranks), len(ranks)) if len(ranks) > sharers else None
        for rank in ranks:
            found = rank[index]["weights"]
            worst = max(float((found[name] - w).abs().max()) for name, w in weights.items())
            assert worst <= TOLERANCE, f"{case} differs by {worst:.1e}"
            assert all(torch.equal(w, ranks[0][index]["weights"][name]) for name, w in found.items())
        if together is not None:  # and it is not what one ascent of all does
            other = max(float((weights[name] - w).abs().max()) for name, w in together.items())
            assert other > 100 * TOLERANCE


@pytest.mark.slow
def test_one_process_takes_every_scope() -> None:
    check(IN_PARTS, [alone(train, "single", IN_PARTS)], 1)
    whole = [
        Case("vit", "element"),
        Case("vit", "element", direction=WORKER),
        Case("vit", "element", direction=IN_GROUP),
    ]
    plain, *others = alone(train, "single", whole)
    for other in others:
        assert all(torch.equal(w, plain["weights"][name]) for name, w in other["weights"].items())


@pytest.mark.slow
@pytest.mark.parametrize("backend", few(["ddp", "zero0", "zero1", "zero2"], "ddp", "zero2"))
def test_workers_climb_by_their_own_batch_where_each_holds_all_weights(backend: str) -> None:
    check(ON_REPLICAS, run_ranks(2, train, backend, ON_REPLICAS), 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "sharers"),
    [
        ("fsdp2", 2),
        *(pytest.param(backend, 1, marks=pytest.mark.exhaustive) for backend in ("ddp", "zero0", "zero1", "zero2")),
        ("zero3", 2),
    ],
)
def test_micro_batches_climb_and_descend_by_themselves(backend: str, sharers: int) -> None:
    check(IN_PARTS, run_ranks(2, train, backend, IN_PARTS), sharers)


def on_copies(world: World) -> list[dict[str, Any]]:
    return train(world, "fsdp2", [*IN_PARTS, Case("vit", "tensor", direction=IN_GROUP)], replicas=2)


@pytest.mark.slow
def test_copies_of_sharded_weights_climb_by_their_own_batch_or_micro_batch() -> None:
    check([*IN_PARTS, Case("vit", "tensor", direction=IN_GROUP)], run_ranks(4, on_copies), 2)


def sent(world: World, backends: list[str]) -> dict[str, float]:
    """Bytes that an ascent of dense SAM by workers adds to a step of the base optimizer; and refusals."""
    found: dict[str, float] = {}
    for backend, rho in itertools.product(backends, (0.0, RHO)):
        model = small_network("vit")
        blocks = [stage.block for stage in model.stages]
        placed, base = place(
            model, blocks, backend, world, lambda m=model: torch.optim.SGD(m.parameters(), lr=0.1), batch_size=4
        )
        opt = SparseSAM(placed, base, rho=rho, direction=WORKER)
        batch = part(batches(1, 8)[0], world.rank, world.size)
        opt.step(loss_fn, batch)
        with Traffic() as traffic:
            opt.step(loss_fn, batch)
        found[backend] = sum(traffic.bytes.values()) - found.get(backend, 0.0)
    return found


@pytest.mark.slow
def test_an_ascent_of_workers_sends_nothing() -> None:
    assert run_ranks(2, sent, ["ddp", "zero0", "zero1", "zero2"])[0] == dict.fromkeys(
        ["ddp", "zero0", "zero1", "zero2"], 0.0
    )


def calibrations(world: World, backends: list[str]) -> dict[str, Tensor]:
    """What a calibrated norm goes by after steps by workers, on this process."""
    found = {}
    for backend in backends:
        model = small_network("vit")
        blocks = [stage.block for stage in model.stages]
        placed, base = place(
            model, blocks, backend, world, lambda m=model: torch.optim.SGD(m.parameters(), lr=0.1), batch_size=4
        )
        opt = SparseSAM(placed, base, rho=RHO, direction=WORKER, norm="calibrated", mask=Norms())
        for batch in batches(2, 8):
            opt.step(loss_fn, part(batch, world.rank, world.size))
        found[backend] = torch.stack([*opt.sparse.state_dict()["shares"].values()]).clone()
    return found


@pytest.mark.slow
def test_what_workers_calibrate_by_is_the_same_on_all_as_a_checkpoint_has_one() -> None:
    """Each by its own gradient, and then the mean: a resumed run goes on as it would have."""
    one, other = run_ranks(2, calibrations, ["ddp", "zero0", "zero2"])
    for backend, shares in one.items():
        assert torch.equal(shares, other[backend]), backend
        assert float(shares.sum()) == pytest.approx(1.0, abs=1e-5), backend


def refusals(world: World) -> dict[str, str]:
    told = {}
    for backend, scope in (
        ("fsdp2", "worker"),
        ("zero3", "worker"),
        ("ddp", "shard_group"),
        ("fsdp2", "shard_group"),
    ):
        model = small_network("vit")
        blocks = [stage.block for stage in model.stages]
        placed, base = place(
            model, blocks, backend, world, lambda m=model: torch.optim.SGD(m.parameters(), lr=0.1), batch_size=4
        )
        try:
            SparseSAM(placed, base, direction=Fresh(scope=scope))  # type: ignore[arg-type]
        except ValueError as error:
            told[f"{backend} {scope}"] = str(error)
    model = small_network("vit")
    placed, base = place(model, [], "ddp", world, lambda: torch.optim.SGD(model.parameters(), lr=0.1), batch_size=4)
    opt = SparseSAM(placed, base, direction=WORKER)
    try:
        opt.step(lambda: None)
    except RuntimeError as error:
        told["closure"] = str(error)
    try:
        with opt.perturbed():
            pass
    except RuntimeError as error:
        told["by hand"] = str(error)
    return told


@pytest.mark.slow
def test_a_scope_that_the_sharding_cannot_have_is_refused() -> None:
    told = run_ranks(2, refusals)[0]
    assert "no process holds all weights: use scope 'micro_batch'" in told["fsdp2 worker"]
    assert "no process holds all weights" in told["zero3 worker"]
    assert "each process is one: use scope 'worker'" in told["ddp shard_group"]
    assert "there is only one" in told["fsdp2 shard_group"]
    for form in ("closure", "by hand"):
        assert "scope 'worker' is by a part of their batch: call opt.step(loss_fn, batch)" in told[form]

"""What DistributedDataParallel was told when it was built, and a step may not go against without a word."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._composable.replicate import replicate
from torch.nn.parallel import DistributedDataParallel

from ssam_scale import Named, Scored, SparseSAM
from ssam_scale.sharding import World
from tests.support.networks import batches, loss_fn
from tests.support.ranks import run_ranks


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 8), nn.Tanh(), nn.Linear(8, 10))


def by_batches(opt: SparseSAM, model: nn.Module, batch: Any) -> None:
    opt.step(loss_fn, batch)


def by_closure(opt: SparseSAM, model: nn.Module, batch: Any) -> None:
    def closure() -> Tensor:
        opt.zero_grad()
        loss = loss_fn(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    opt.step(closure)


def by_hand(opt: SparseSAM, model: nn.Module, batch: Any) -> None:
    loss_fn(model, batch).backward()  # type: ignore[no-untyped-call]
    with opt.perturbed():
        loss_fn(model, batch).backward()  # type: ignore[no-untyped-call]
    opt.step()
    opt.zero_grad()


def spread(model: nn.Module) -> float:
    """How far the weights of the ranks are from each other."""
    spreads = []
    for p in model.parameters():
        every = [torch.empty_like(p) for _ in range(dist.get_world_size())]
        dist.all_gather(every, p.detach())
        spreads += [float((other - every[0]).abs().max()) for other in every]
    return max(spreads)


def told(train: Callable[[], Any]) -> str:
    try:
        return str(train())
    except ValueError as error:
        return str(error)


def static_graph(world: World) -> dict[str, str]:
    data = batches(3, 4, seed=world.rank)

    def train(form: Callable[[SparseSAM, nn.Module, Any], None], mask: Any = None, rho: float = 0.1) -> float:
        model = DistributedDataParallel(small(), static_graph=True)
        opt = SparseSAM(model, torch.optim.SGD(model.parameters(), lr=0.1), rho=rho, mask=mask)
        if opt.refresh_is_due:
            opt.refresh(loss_fn, *[(x[:1], y[:1]) for x, y in data])
        for batch in data:
            form(opt, model, batch)
        return spread(model)

    return {
        "batches": told(lambda: train(by_batches)),
        "scores": told(lambda: train(by_hand, Scored("element", 0.5, score="fisher"))),
        "batches without an ascent": told(lambda: train(by_batches, rho=0.0)),
        "closure": told(lambda: train(by_closure)),
        "by hand": told(lambda: train(by_hand, Scored("element", 0.5, score="weight"))),
    }


def test_a_static_graph_takes_the_forms_that_run_both_passes_through_it() -> None:
    for said in run_ranks(2, static_graph):
        for form in ("batches", "scores"):
            assert "build it with static_graph=False, or run both passes through it" in said[form], form
        for form in ("batches without an ascent", "closure", "by hand"):
            assert said[form] == "0.0", form


def unfrozen(world: World) -> dict[str, str]:
    data = batches(4, 4, seed=world.rank)

    def train(frozen: str, *, find: bool = False, built_in: int = 0) -> float:
        """`frozen` is when the first layer is: before or after DDP is built; SparseSAM is built before a step."""
        model = small()
        model[1].requires_grad_(frozen != "before")
        wrapped = DistributedDataParallel(model, find_unused_parameters=find)
        base = torch.optim.SGD(model.parameters(), lr=0.1)
        model[1].requires_grad_(frozen == "never")
        opt = SparseSAM(wrapped, base, rho=0.1) if built_in == 0 else None
        for step, batch in enumerate(data):
            if step == 2:
                model[1].requires_grad_(True)
                opt = SparseSAM(wrapped, base, rho=0.1) if opt is None else opt
            if opt is not None:
                opt.step(loss_fn, batch)
        return spread(model)

    def replaced() -> float:
        model = small()
        wrapped = DistributedDataParallel(model)
        model[1] = nn.Linear(3 * 32 * 32, 8)
        opt = SparseSAM(wrapped, torch.optim.SGD(model.parameters(), lr=0.1), rho=0.1)
        model[3] = nn.Linear(8, 10)
        opt.base_optimizer.param_groups[0]["params"] = list(model.parameters())
        opt.step(loss_fn, data[0])
        return spread(model)

    return {
        "before": told(lambda: train("before")),
        "before, built late": told(lambda: train("before", built_in=2)),
        "replaced": told(replaced),
        "after": told(lambda: train("after", find=True)),
        "never": told(lambda: train("never")),
    }


def test_layers_that_are_unfrozen_after_ddp_was_built_are_refused_where_it_does_not_know_them() -> None:
    for said in run_ranks(2, unfrozen):
        for case, name in {"before": "1.weight", "before, built late": "1.weight", "replaced": "3.weight"}.items():
            assert (
                f"2 parameters that require gradients now (the first: {name}) were frozen, or not there," in said[case]
            )
            assert "with find_unused_parameters=True, and freeze after that" in said[case]
        assert said["after"] == said["never"] == "0.0"


def shared_otherwise(world: World) -> dict[str, str]:
    """What a rank is told of a model whose gradients are averaged past what SparseSAM was given."""
    batch = batches(1, 4, seed=world.rank)[0]

    def step(given: Any, model: nn.Module) -> str:
        opt = SparseSAM(given, torch.optim.SGD(model.parameters(), lr=0.1), rho=0.1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            by_closure(opt, model, batch)
        return "; ".join(str(w.message) for w in caught) or str(spread(model))

    wrapped, hooked, alone = DistributedDataParallel(small()), small(), small()
    replicate(hooked)
    return {
        "the parameters of DDP": step(list(wrapped.parameters()), wrapped),
        "replicate": step(hooked, hooked),
        "parameters": step(alone.parameters(), alone),
    }


def test_what_is_shared_by_ddp_or_replicate_is_not_said_to_be_alone() -> None:
    for said in run_ranks(2, shared_otherwise):
        assert said["the parameters of DDP"] == said["replicate"] == "0.0"
        assert "SparseSAM trains a model that no other shares" in said["parameters"]


def gone_around(world: World) -> dict[str, str]:
    """What becomes of steps that do not go as DDP, or `replicate`, has to have them."""
    data = batches(2, 4, seed=world.rank)

    def train(how: str) -> float:
        model = small()
        wrapped: Any = DistributedDataParallel(model)
        calls = {"DDP called": wrapped, "the model called": model}.get(how)
        if how == "replicate":
            replicate(wrapped := model)
        mask = Named("3") if how == "replicate" else None
        opt = SparseSAM(wrapped, torch.optim.SGD(model.parameters(), lr=0.1), rho=0.1, mask=mask)
        context = {"no_sync": "no_sync", "join": "join"}.get(how)
        with getattr(wrapped, context)() if context else nullcontext():
            for batch in data:
                opt.step(loss_fn if calls is None else lambda forward, batch: loss_fn(calls, batch), batch)
        return spread(model)

    ways = ("no_sync", "join", "DDP called", "the model called", "replicate", "plain")
    return {how: told(lambda how=how: train(how)) for how in ways}  # type: ignore[misc]


def test_steps_that_go_around_the_averaging_of_gradients_are_refused_or_averaged() -> None:
    """The copies drifted apart, or the ascent was by something else, and nothing said so."""
    for said in run_ranks(2, gone_around):
        assert said["plain"] == said["no_sync"] == "0.0"
        for how in ("DDP called", "the model called"):
            assert "called the model, or DDP, in the place of the `forward` that it was given" in said[how], how
        assert "the step is within DistributedDataParallel.join" in said["join"]
        assert "composable replicate, which waits for the gradients of all weights" in said["replicate"]

"""A base optimizer that would step what a backend hands it to another place than whole tensors is found by trying."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import ssam_scale.models  # noqa: F401  timm can be imported then
from ssam_scale import SparseSAM
from ssam_scale.perturbation.arguments import check_optimizer
from ssam_scale.sharding import ProcessGroup, World, place
from ssam_scale.sharding.optimizer_trial import check_steps
from tests.support.networks import batches, loss_fn, part, small_network
from tests.support.ranks import alone, run_ranks
from tests.support.tiers import few

BATCH, STEPS = 12, 3


def network() -> nn.ModuleList:
    return nn.ModuleList([nn.Conv2d(2, 3, 3), nn.Linear(3, 3), nn.LayerNorm(4)])


def timms(name: str, net: nn.Module | None = None, **options: Any) -> torch.optim.Optimizer:
    from timm.optim import create_optimizer_v2

    options = {"lr": 1e-3, "weight_decay": 1e-2, "momentum": 0.9, **options}
    made: torch.optim.Optimizer = create_optimizer_v2(net if net is not None else network(), opt=name, **options)
    return made


def on_pieces(optimizer: torch.optim.Optimizer) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dimensions = [{p.ndim for p in group["params"]} for group in optimizer.param_groups]
        check_steps(optimizer, "pieces", ProcessGroup(), dimensions)


# ---- optimizers of users


class Elementwise(torch.optim.Optimizer):
    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(self.direction(p, p.grad), alpha=-group["lr"])

    def direction(self, p: Tensor, g: Tensor) -> Tensor:
        return g.sign()


class ByNorm(Elementwise):
    """Normalized gradient descent."""

    def direction(self, p: Tensor, g: Tensor) -> Tensor:
        return g / g.norm()


class ByLocalNorm(Elementwise):
    """Somebody's way around DTensor."""

    def direction(self, p: Tensor, g: Tensor) -> Tensor:
        if isinstance(g, DTensor):
            local = g.to_local()
            return DTensor.from_local(
                local / local.norm(), g.device_mesh, g.placements, shape=g.shape, stride=g.stride()
            )
        return g / g.norm()


class FailsOnEmpty(Elementwise):
    """Raises on the process that has nothing of a tensor, while the others communicate."""

    def direction(self, p: Tensor, g: Tensor) -> Tensor:
        if isinstance(g, DTensor) and g.to_local().numel() == 0:
            raise IndexError("nothing here")
        return g / g.norm().full_tensor() if isinstance(g, DTensor) else g / g.norm()


class Mixed(Elementwise):
    """Keeps plain tensors, of which there are none of in a DTensor's operators."""

    def direction(self, p: Tensor, g: Tensor) -> Tensor:
        return g + torch.zeros(g.shape)


class Several(torch.optim.Optimizer):
    """Two optimizers as one."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = list(optimizers)
        super().__init__([group for each in optimizers for group in each.param_groups], {})
        self.param_groups = [group for each in optimizers for group in each.param_groups]

    def step(self, closure: Any = None) -> None:
        for each in self.optimizers:
            each.step()


class HoldsNetwork(Elementwise):
    def __init__(self, net: nn.Module) -> None:
        super().__init__(net.parameters())
        self.net = net


# ---- flat pieces


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in ("sgd", "momentum", "adamw", "adagrad", "nadamc", "lion", "adan", "madgrad", "sgdc")),
        ("adamw", {"amsgrad": True}),
        ("lion", {"foreach": True}),
        ("sgdp", {"momentum": 0.0, "weight_decay": 0.0, "delta": 0.0}),  # which never projects
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "plain",
)
def test_what_treats_every_weight_alike_is_taken(name: str, options: dict[str, Any]) -> None:
    on_pieces(timms(name, **options))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in ("lamb", "lars", "sgdp", "adamp", "muon", "adafactor", "novograd", "mars", "clion")),
        ("lamb", {"weight_decay": 0.0}),  # which clips by the norm of all gradients
        ("nadamw", {"caution": True}),
        ("sgdp", {"momentum": 0.0, "weight_decay": 0.0}),
        ("kron", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "plain",
)
@pytest.mark.filterwarnings("ignore:It is highly recommended")
def test_what_looks_at_whole_tensors_is_refused(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"does not step flat pieces of tensors.*off by [0-9]+% of the way; use SGD, "):
        on_pieces(timms(name, **options))


def lookahead(inner: torch.optim.Optimizer) -> torch.optim.Optimizer:
    from timm.optim import Lookahead

    made: torch.optim.Optimizer = Lookahead(inner)
    return made


def test_users_and_composed_optimizers_are_tried_as_well() -> None:
    on_pieces(Elementwise(network().parameters()))
    on_pieces(lookahead(timms("adamw")))
    on_pieces(Several(timms("adamw"), Elementwise(network().parameters())))
    with pytest.raises(ValueError, match="ByNorm, as it is set up"):
        on_pieces(ByNorm(network().parameters()))
    with pytest.raises(ValueError, match=r"Lookahead \(Lamb\), as it is set up"):
        on_pieces(lookahead(timms("lamb")))
    with pytest.raises(ValueError, match=r"Several \(AdamW, ByNorm\), as it is set up"):
        on_pieces(Several(timms("adamw"), ByNorm(network().parameters())))


def test_a_group_is_tried_with_tensors_of_its_own_dimensions() -> None:
    net = network()
    muon = torch.optim.Muon([net[1].weight])
    with pytest.raises(ValueError, match=r"^Muon, as it is set up, .*: [A-Z]"):
        on_pieces(muon)


def test_what_cannot_be_copied_is_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"whether HoldsNetwork steps pieces .* cannot be tried: .*holds a network"):
        check_steps(HoldsNetwork(network()), "pieces", ProcessGroup(), [{1, 2, 4}])


def test_a_trial_leaves_nothing_changed() -> None:
    net = network()
    optimizer = timms("kron", net)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("hook"))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    weights, options = copy.deepcopy(net.state_dict()), copy.deepcopy(optimizer.state_dict())
    drawn, own = torch.get_rng_state(), optimizer.rng.getstate()
    python = random.getstate()
    with pytest.raises(ValueError, match="Kron"):
        on_pieces(optimizer)
    assert calls == []
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in weights.items())
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in net.parameters())
    assert optimizer.state_dict() == options
    assert torch.equal(torch.get_rng_state(), drawn)
    assert optimizer.rng.getstate() == own
    assert random.getstate() == python
    assert scheduler.last_epoch == 0


# ---- shards


MAKERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "Elementwise": lambda net: Elementwise(net.parameters(), 1e-3),
    "ByNorm": lambda net: ByNorm(net.parameters(), 1e-2),
    "ByLocalNorm": lambda net: ByLocalNorm(net.parameters()),
    "FailsOnEmpty": lambda net: FailsOnEmpty(net.parameters()),
    "Mixed": lambda net: Mixed(net.parameters()),
    "Lookahead": lambda net: lookahead(timms("lamb", net)),
}


def train(world: World, backend: str, name: str) -> dict[str, Tensor] | str:
    """Whole weights after some steps; or why the optimizer is refused."""
    model = small_network("vit")
    make = MAKERS.get(name, lambda net: timms(name, net))
    distributed, base = place(
        model,
        [stage.block for stage in model.stages],
        backend,
        world,
        lambda: make(model),
        batch_size=BATCH // world.size,
    )
    try:
        opt = SparseSAM(distributed, base)
    except ValueError as error:
        opt = SparseSAM(distributed, torch.optim.SGD(distributed.parameters(), lr=0.1)) if backend == "fsdp2" else None
        if opt is not None:  # with another one training goes on
            opt.step(loss_fn, part(batches(1, BATCH)[0], world.rank, world.size))
        return str(error)
    for batch in batches(STEPS, BATCH):
        opt.step(loss_fn, part(batch, world.rank, world.size))
    named = opt.parameters.by_name
    shards = opt.sharding.shards(list(named.values()))
    return {n: opt.sharding.gather(p, s.weight).clone() for (n, p), s in zip(named.items(), shards, strict=True)}


@torch.no_grad()
def share_of_way(name: str, found: dict[str, Tensor]) -> float:
    """How far weights are from those of one process, as a share of the way that these have gone."""
    start, one = dict(small_network("vit").model.named_parameters()), alone(train, "single", name)
    apart = torch.stack([(found[n] - w).norm() for n, w in one.items()]).norm()
    return float(apart / torch.stack([(w - start[n]).norm() for n, w in one.items()]).norm())


@pytest.mark.slow
@pytest.mark.parametrize("size", few([2, 3], 2))
def test_shards_of_users_optimizers(size: int) -> None:
    """Of a class token one rank has everything, and the others nothing."""
    for name in ("ByNorm", "Lookahead"):
        for found in run_ranks(size, train, "fsdp2", name):
            assert not isinstance(found, str), found
            assert share_of_way(name, found) < 1e-4
    for name, why in {
        "FailsOnEmpty": "IndexError: nothing here",
        "ByLocalNorm": "off by [0-9]+% of the way",
        "Mixed": "mixed torch.Tensor and DTensor",
        "sgdp": "RuntimeError",
    }.items():
        said = run_ranks(size, train, "fsdp2", name)
        assert len(set(said)) == 1, said
        kind = "SGDP" if name == "sgdp" else name
        with pytest.raises(ValueError, match=f"{kind}, as it is set up, does not step shards of FSDP2 .*{why}"):
            raise ValueError(said[0])


def replicas(world: World) -> str:
    model = small_network("vit")
    distributed, base = place(
        model, [s.block for s in model.stages], "fsdp2", world, lambda: timms("adamp", model), replicas=2
    )
    with pytest.raises(ValueError, match="AdamP") as refusal:
        SparseSAM(distributed, base)
    assert dist.get_world_size() == world.size
    return str(refusal.value)


@pytest.mark.slow
def test_shards_with_replicas() -> None:
    assert len(set(run_ranks(4, replicas))) == 1


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["zero1", "zero2", "zero3"])
def test_an_engine_with_an_optimizer_of_whole_tensors(backend: str) -> None:
    for said in run_ranks(2, train, backend, "lamb"):
        assert isinstance(said, str)
        assert said.startswith("Lamb, as it is set up, does not step flat pieces")
    for found in run_ranks(2, train, backend, "Elementwise"):
        assert not isinstance(found, str), found


# ---- all of timm's


def every() -> list[str]:
    from timm.optim import list_optimizers

    return list(list_optimizers())


# A sign, or a division by the root of a second moment, makes much of the last digit of a gradient that vanishes. What
# is computed from parts of tensors is further off.
TOLERANCE = 0.01


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore:It is highly recommended")
@pytest.mark.parametrize("name", every())
@pytest.mark.parametrize("backend", ["fsdp2", "zero2", "ddp"])
def test_two_ranks_step_as_one_process_or_say_that_they_do_not(backend: str, name: str) -> None:
    try:
        check_optimizer(timms(name))
    except (AssertionError, ImportError, TypeError, ValueError) as error:  # what cannot be built here, or never be used
        pytest.skip(str(error))
    found, other = run_ranks(2, train, backend, name)
    if isinstance(found, str):
        assert backend != "ddp"
        assert found == other
        return
    assert all(torch.equal(weight, other[n]) for n, weight in found.items())
    assert share_of_way(name, found) < TOLERANCE

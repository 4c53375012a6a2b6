"""Lion, SGDP and AdamP of timm under SparseSAM equal their papers' equations, on one process and on several."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssam_scale import Scored, SparseSAM
from ssam_scale.perturbation.reference import reference_step
from ssam_scale.sharding import World, place
from tests.support.masks import whole_mask
from tests.support.networks import CLASSES, batches, part
from tests.support.ranks import alone, run_ranks

STEPS, BATCH = 4, 8
# A gradient at w + ε is orthogonal to w + ε, where weights are scale-invariant, and to w as far as ε is small.
RHO = {"lion": 0.1, "sgdp": 0.005, "adamp": 0.005, "sgdp nesterov": 0.005, "adamp nesterov": 0.005}
# Another order of summation in fp32; of AdamP what its division by the root of the second moment makes of that. Its eps
# is also added to lengths of weights in timm, which is nothing.
TOLERANCE = 1e-6
OPTIONS: dict[str, dict[str, Any]] = {
    "lion": {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.1},
    "sgdp": {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.01, "nesterov": False},
    "adamp": {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.1, "nesterov": False},
}
# What timm's factory makes of their names.
OPTIONS |= {f"{name} nesterov": {**OPTIONS[name], "nesterov": True} for name in ("sgdp", "adamp")}


class Slow(torch.optim.Optimizer):
    """One parameter after the other, from the equations."""

    def __init__(self, parameters: Iterable[Tensor], **options: Any) -> None:
        super().__init__(parameters, {"lr": 0.0, "weight_decay": 0.0, "momentum": 0.0, "eps": 1e-8, **options})
        self.projected: Counter[str] = Counter()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        (group,) = self.param_groups
        for w in group["params"]:
            w.copy_(self.stepped(w, w.grad, self.state[w], group))

    def stepped(self, w: Tensor, g: Tensor, state: dict[str, Any], o: dict[str, Any]) -> Tensor:
        raise NotImplementedError


class Lion(Slow):
    """2302.06675, Algorithm 2: the sign of one mean of gradients, of which another is kept."""

    def stepped(self, w: Tensor, g: Tensor, state: dict[str, Any], o: dict[str, Any]) -> Tensor:
        beta1, beta2 = o["betas"]
        m = state.get("m", torch.zeros_like(w))
        state["m"] = beta2 * m + (1 - beta2) * g
        return w - o["lr"] * (torch.sign(beta1 * m + (1 - beta1) * g) + o["weight_decay"] * w)


class Projecting(Slow):
    """2006.08217, equations 11 and 12: without the update's part along the weights, where these are scale-invariant.

    Which is told by the gradient, first of each output channel's weights and then of all: |cos(w, g)| < 0.1 / √n.
    Weight decay is a tenth there, as in the authors' code (`wd_ratio`).
    """

    def projection(self, w: Tensor, g: Tensor, p: Tensor) -> tuple[Tensor, float]:
        if w.ndim < 2:
            return p, 1.0
        for name, rows in (("channels", w.shape[0]), ("layer", 1)):
            ws, gs, ps = (t.reshape(rows, -1).double() for t in (w, g, p))
            cosines = [abs(a @ b) / (a.norm() * b.norm()) for a, b in zip(ws, gs, strict=True)]
            if max(cosines) < 0.1 / math.sqrt(ws.shape[1]):
                self.projected[name] += 1
                q = [c - (a @ c) / (a @ a) * a for a, c in zip(ws, ps, strict=True)]
                return torch.stack(q).reshape(w.shape).float(), 0.1
        self.projected["none"] += 1
        return p, 1.0


class SGDP(Projecting):
    """Algorithm 2. Decay is decoupled, and as much as SGD's comes to by its momentum (the authors' code)."""

    def stepped(self, w: Tensor, g: Tensor, state: dict[str, Any], o: dict[str, Any]) -> Tensor:
        state["p"] = p = o["momentum"] * state.get("p", torch.zeros_like(w)) + g
        q, ratio = self.projection(w, g, g + o["momentum"] * p if o["nesterov"] else p)
        return w * (1 - o["lr"] * o["weight_decay"] * ratio / (1 - o["momentum"])) - o["lr"] * q


class AdamP(Projecting):
    """Algorithm 3, with AdamW's decoupled decay."""

    def stepped(self, w: Tensor, g: Tensor, state: dict[str, Any], o: dict[str, Any]) -> Tensor:
        beta1, beta2 = o["betas"]
        state["t"] = t = state.get("t", 0) + 1
        state["m"] = beta1 * state.get("m", torch.zeros_like(w)) + (1 - beta1) * g
        state["v"] = beta2 * state.get("v", torch.zeros_like(w)) + (1 - beta2) * g * g
        m = beta1 * state["m"] + (1 - beta1) * g if o["nesterov"] else state["m"]
        p = (m / (1 - beta1**t)) / ((state["v"] / (1 - beta2**t)).sqrt() + o["eps"])
        q, ratio = self.projection(w, g, p)
        return w * (1 - o["lr"] * o["weight_decay"] * ratio) - o["lr"] * q


SLOW: dict[str, type[Slow]] = {"lion": Lion, "sgdp": SGDP, "adamp": AdamP}


def network() -> nn.Sequential:
    """Weights that are scale-invariant by channel, as a whole, and not at all, whatever the batch is split into."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 7, 3, stride=4, bias=False),
        nn.GroupNorm(7, 7, affine=False),
        nn.GELU(),
        nn.Conv2d(7, 9, 3, bias=False),
        nn.GroupNorm(1, 9),
        nn.GELU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(36, CLASSES),
    )


def loss_fn(forward: Callable[[Tensor], Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(forward(batch[0]), batch[1])


def train(world: World, backend: str, name: str, sparse: bool) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Whole weights after some steps, and what each perturbed."""
    from timm.optim import get_optimizer_class

    net = network()
    kind = get_optimizer_class(name.partition(" ")[0], bind_defaults=False)
    model, base = place(
        net,
        [net[0], net[3]],
        backend,
        world,
        lambda: kind(net.parameters(), **OPTIONS[name]),
        batch_size=BATCH // world.size,
    )
    mask = Scored("element", 0.5, score="weight") if sparse else None
    opt = SparseSAM(model, base, rho=RHO[name], mask=mask)
    if sparse:
        opt.refresh(loss_fn, part(batches(1, BATCH)[0], world.rank, world.size))
    masks = []
    for batch in batches(STEPS, BATCH):
        masks.append(whole_mask(opt))
        opt.step(loss_fn, part(batch, world.rank, world.size))
    named = opt.parameters.by_name
    shards = opt.sharding.shards(list(named.values()))
    return {n: opt.sharding.gather(p, s.weight) for (n, p), s in zip(named.items(), shards, strict=True)}, masks


def check(name: str, sparse: bool, ranks: list[tuple[dict[str, Tensor], list[dict[str, Tensor]]]]) -> None:
    weights, masks = ranks[0]
    for mask in masks:
        share = float(torch.cat([m.flatten() for m in mask.values()]).float().mean())
        assert share == (pytest.approx(0.5, abs=0.01) if sparse else 1.0)
    net = network()
    optimizer = SLOW[name.partition(" ")[0]](net.parameters(), **OPTIONS[name])
    with torch.enable_grad():
        for batch, mask in zip(batches(STEPS, BATCH), masks, strict=True):
            rho = dict.fromkeys(dict(net.named_parameters()), RHO[name])
            reference_step(net, optimizer, loss_fn, batch, rho=rho, mask=mask, norm="masked")
    if name != "lion":
        assert optimizer.projected.keys() == {"channels", "layer", "none"}
    for parameter, expected in net.named_parameters():
        assert float((weights[parameter] - expected.detach()).abs().max()) <= TOLERANCE, parameter
    for other, _ in ranks[1:]:
        assert all(torch.equal(other[n], weight) for n, weight in weights.items())


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "element"])
@pytest.mark.parametrize("name", OPTIONS)
def test_one_process_equals_the_paper(name: str, sparse: bool) -> None:
    check(name, sparse, [alone(train, "single", name, sparse)])


@pytest.mark.slow
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "element"])
@pytest.mark.parametrize(
    ("backend", "name"),
    [
        *((backend, name) for backend in ("ddp", "zero0") for name in OPTIONS),
        *((backend, "lion") for backend in ("fsdp2", "zero1", "zero2", "zero3")),
    ],
)
def test_two_ranks_equal_the_paper(backend: str, name: str, sparse: bool) -> None:
    check(name, sparse, run_ranks(2, train, backend, name, sparse))


def refused(world: World, backend: str, name: str) -> str:
    with pytest.raises(ValueError, match="whole tensors") as refusal:
        train(world, backend, name, False)
    return str(refusal.value)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sgdp", "adamp"])
@pytest.mark.parametrize("backend", ["fsdp2", "zero1", "zero2", "zero3"])
def test_projections_of_parts_are_refused(backend: str, name: str) -> None:
    kind = {"sgdp": "SGDP", "adamp": "AdamP"}[name]
    what = "shards of FSDP2" if backend == "fsdp2" else "flat pieces of tensors, which ZeRO stages 1 to 3 hand it,"
    for said in run_ranks(2, refused, backend, name):
        assert said.startswith(f"{kind}, as it is set up, does not step {what} to the same place as whole tensors: ")
        assert "; use SGD, AdamW, Lion or another that treats every weight alike, or DDP" in said

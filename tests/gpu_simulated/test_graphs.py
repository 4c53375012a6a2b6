"""A small ascent as CUDA graphs: the same steps, bit for bit, in a handful of launches."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ssam_scale import Depth, Fresh, Friendly, Savings, Scored, SparseSAM
from ssam_scale.masks import Dense, Mask
from ssam_scale.models import drop_by_row, staged
from ssam_scale.perturbation import StagedModel
from ssam_scale.perturbation.directions import Direction
from ssam_scale.sharding import World
from ssam_scale.sharding.place import place
from tests.support.networks import IMAGE, batches, loss_fn, small_network
from tests.support.pretended_gpu.watch import Watch
from tests.support.training import BATCH, on

CUDA = torch.device("cuda")
# Two graphs, and what is around them: images and the loss's gradient, copied to where they are read; the loss.
AROUND = 12
# Of a forward and backward of even the smallest network's last block.
WITHOUT = 40
STEPS = 5

MASKS: dict[str, Callable[[], Mask]] = {
    "dense": Dense,
    "moving cut": lambda: Depth(seed=3),
    "tensor": lambda: Scored("tensor", 0.5, score="weight"),
    "element": lambda: Scored("element", 0.5, score="weight"),
}


def in_bf16(forward: Callable[[Tensor], Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    with torch.autocast("cuda", torch.bfloat16):
        return loss_fn(forward, batch)


def stepped(
    model: nn.Module,
    mask: str = "dense",
    direction: Direction | None = None,
    loss: Callable[..., Tensor] = loss_fn,
    graph_ascent: bool = True,
    micro_batches: int = 1,
) -> tuple[dict[str, Tensor], Watch]:
    """Weights and buffers after some steps, and what was seen of the last one."""
    torch.manual_seed(1)
    model.to(CUDA)
    opt = SparseSAM(
        model,
        torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        rho=0.1,
        mask=MASKS[mask](),
        direction=direction if direction is not None else Fresh(0.25),
        savings=Savings(graph_ascent=graph_ascent),
    )
    watch = Watch()
    opt._phases = opt._perturbation._phases = watch.phases
    for index, batch in enumerate(batches(STEPS, BATCH)):
        parts = [on(CUDA, part) for part in zip(*(t.chunk(micro_batches) for t in batch), strict=True)]
        if opt.refresh_is_due:
            opt.refresh()
        if index < STEPS - 1:
            opt.step(loss, *parts)
            continue
        with watch:
            opt.step(loss, *parts)
    return {name: value.detach().clone() for name, value in model.state_dict().items()}, watch


def ascents(watch: Watch) -> int:
    return watch.total("ascent forward") + watch.total("ascent backward")


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    return [name for name in one if not torch.equal(one[name], other[name])]


Options = dict[str, Any]
CASES: dict[str, tuple[str, Options, Options]] = {
    "resnet, all": ("resnet", {}, {}),
    "vit, moving cut": ("vit", {}, {"mask": "moving cut"}),
    "vit, tensors, bf16": ("vit", {}, {"mask": "tensor", "loss": in_bf16}),
    "resnet, moving cut, bf16": ("resnet", {}, {"mask": "moving cut", "loss": in_bf16}),
    "vit, dropping at random": ("vit", {"drop_rate": 0.3, "drop_path_rate": 0.3}, {}),
    "vit, dropping by row": ("vit", {"drop_rate": 0.3, "proj_drop_rate": 0.1, "drop_path_rate": 0.3}, {}),
    "vit, elements, chosen at random": ("vit", {}, {"mask": "element", "direction": Fresh(0.25, "random")}),
    "convnext, less a mean": ("convnext", {}, {"direction": Friendly(0.25)}),
    "vit, each micro-batch by itself": (
        "vit",
        {},
        {"mask": "moving cut", "direction": Fresh(0.5, scope="micro_batch"), "micro_batches": 2},
    ),
}


def network_of(case: str) -> StagedModel:
    family, options, _ = CASES[case]
    model = small_network(family, **options)
    if "by row" in case:
        drop_by_row(model.model, 5, torch.zeros(1, 3, IMAGE, IMAGE))
    return model


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow) if "elements" in c else c for c in CASES])
def test_steps_are_those_without_graphs(case: str) -> None:
    _, _, options = CASES[case]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        graphed, seen = stepped(network_of(case), **options)
    plain, unlike = stepped(network_of(case), graph_ascent=False, **options)
    assert differing(graphed, plain) == []
    assert ascents(unlike) > WITHOUT
    if options.get("mask") != "moving cut":  # whose last step may have been the first with its cut
        assert not seen.host_waits
        assert ascents(seen) <= AROUND
        assert seen.launches["ascent forward"]["graph"] == seen.launches["ascent backward"]["graph"] == 1


@pytest.mark.slow
def test_ddp_reduces_what_graphs_leave(world: World) -> None:
    found = []
    for graph_ascent in (True, False):
        model = small_network("vit").to(world.device)
        module, base = place(
            model,
            [stage.block for stage in model.stages],
            "ddp",
            world,
            lambda model=model: torch.optim.SGD(model.parameters(), lr=0.05),
            batch_size=BATCH,
        )
        opt = SparseSAM(module, base, rho=0.1, direction=Fresh(0.25), savings=Savings(graph_ascent=graph_ascent))
        for batch in batches(3, BATCH):
            opt.step(loss_fn, on(world.device, batch))
        found.append({name: p.detach().clone() for name, p in model.named_parameters()})
    assert differing(*found) == []


class Waits(nn.Module):
    """Asks for a value, as people write them."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (1.0 if x.sum().item() > 0 else 0.5)


def with_norm(norm: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), norm, nn.Flatten(), nn.LazyLinear(10)]
    model = nn.Sequential(*layers).train()
    model(torch.zeros(2, 3, 32, 32))
    return model


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (Waits, "operation not permitted when stream is capturing"),
        (lambda: nn.InstanceNorm2d(8, track_running_stats=True), "a module writes to its buffers"),
    ],
)
def test_what_cannot_be_captured_runs_as_it_is_and_says_why_once(layer: Callable[[], nn.Module], reason: str) -> None:
    with pytest.warns(UserWarning, match="savings.graph_ascent: the ascent runs without CUDA graphs") as said:
        graphed, _ = stepped(with_norm(layer()))
    assert [reason in str(each.message) for each in said] == [True]
    plain, _ = stepped(with_norm(layer()), graph_ascent=False)
    assert differing(graphed, plain) == []


@pytest.mark.parametrize("options", [{"direction": Fresh()}, {"micro_batches": 2}], ids=["whole batch", "accumulating"])
def test_other_ascents_are_not_captured(options: Options) -> None:
    _, seen = stepped(small_network("resnet"), **options)
    assert "graph" not in seen.launches["ascent forward"]
    assert ascents(seen) > WITHOUT


@pytest.mark.parametrize("name", ["resnet50", pytest.param("vit_small_patch16_224", marks=pytest.mark.slow)])
def test_at_the_depth_of_a_real_network_a_small_ascent_takes_hundreds_of_launches_or_ten(name: str) -> None:
    """Narrow: launches do not depend on it."""
    import timm

    narrow = {"channels": (8, 8, 16, 16)} if name == "resnet50" else {"embed_dim": 32, "num_heads": 2, "img_size": 32}
    found = []
    for graph_ascent in (False, True):
        torch.manual_seed(0)
        model = staged(timm.create_model(name, num_classes=10, **narrow).train())
        found.append(stepped(model, loss=in_bf16, graph_ascent=graph_ascent)[1])
    plain, graphed = found
    base = plain.total("descent forward") + plain.total("descent backward")
    print(f"{name}: base {base} launches, its small ascent {ascents(plain)}, as graphs {ascents(graphed)}")
    assert ascents(plain) > 0.85 * base  # an eighth of the images, and nearly all of the launches
    assert ascents(graphed) <= AROUND
    assert not graphed.host_waits

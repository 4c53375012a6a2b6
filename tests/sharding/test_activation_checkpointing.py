"""Activation checkpointing changes nothing but memory: the same bits on every backend, in whatever way is trained."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ssam_scale import Fresh, SparseSAM
from ssam_scale.perturbation import StagedModel
from ssam_scale.sharding import World
from tests.support.networks import batches, loss_fn, small_network
from tests.support.ranks import run_ranks
from tests.support.tiers import few
from tests.support.training import Case, train


@dataclass(frozen=True)
class Again(Case):
    """A network that drops at random and normalises by the batch, whose blocks may be computed again."""

    again: bool = False

    def make_model(self) -> StagedModel:
        kwargs = {"vit": {"drop_path_rate": 0.3, "proj_drop_rate": 0.2}, "resnet": {"drop_path_rate": 0.3}}
        model = small_network(self.family, **kwargs[self.family]).train()
        model.activation_checkpointing = self.again
        return model


CASES = [
    Again("resnet", "moving cut"),
    Again("resnet", "row", accumulation=2),
    Again("vit", "tensor", optimizer="adamw"),
    Again("vit", "fixed cut", direction=Fresh(0.5), accumulation=2),
    Again("vit", "moving cut", precision=torch.bfloat16),
    Again("resnet", "dense", norm="dense"),
    Again("resnet", "element", direction=Fresh(0.5)),
]


def _with_and_without(world: World, backend: str, cases: list[Again]) -> list[list[str]]:
    """What differs of each case."""
    differing = []
    for case in cases:
        plain, again = train(world, backend, [case, replace(case, again=True)])
        differing.append(
            [
                f"{what} {name}"
                for what in ("weights", "state")
                for name, value in plain[what].items()
                if not torch.equal(value, again[what][name])
            ]
            + (["losses"] if not torch.equal(plain["losses"], again["losses"]) else [])
        )
    return differing


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_process(case: Again) -> None:
    assert _with_and_without(World(), "single", [case]) == [[]]


@pytest.mark.slow
@pytest.mark.parametrize("backend", few(["ddp", "fsdp2", "zero0", "zero1", "zero2", "zero3"], "fsdp2"))
def test_two_processes(backend: str) -> None:
    # Of ZeRO 3, each step of which takes long, one with BatchNorm and one with micro-batches.
    cases = [CASES[0], CASES[3]] if backend == "zero3" else CASES
    assert run_ranks(2, _with_and_without, backend, cases) == [[[]] * len(cases)] * 2


class Counting(nn.Module):
    """How often a module has run."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.runs = inner, 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return self.inner(x)


def _kept(model: StagedModel, images: Tensor) -> int:
    """Bytes that a forward keeps for its backward, without the weights."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(images)
    del output
    return sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in own)


def test_less_is_kept() -> None:
    images = batches(1, 8)[0][0]
    for family in ("resnet", "convnext", "vit"):
        model = small_network(family).train()
        plain = _kept(model, images)
        model.activation_checkpointing = True
        assert _kept(model, images) < 0.6 * plain, family


def test_each_block_but_the_last_runs_once_more_for_each_backward() -> None:
    model = small_network("vit")
    blocks: Any = model.model.blocks
    counted = [Counting(block.mlp) for block in blocks]
    for block, counting in zip(blocks, counted, strict=True):
        block.mlp = counting
    model.train()
    model.activation_checkpointing = True
    opt = SparseSAM(model, torch.optim.SGD(model.parameters(), lr=0.1), rho=0.1)
    opt.step(loss_fn, batches(1, 4)[0])
    assert [c.runs for c in counted] == [4, 4, 4, 2]
    model.eval()
    with torch.no_grad():
        model(batches(1, 4)[0][0])
    assert [c.runs for c in counted] == [5, 5, 5, 3]


def test_statistics_are_updated_once_even_where_a_layer_is_in_evaluation_mode() -> None:
    model = small_network("resnet").train()
    model.model.layer1[0].bn1.eval()  # type: ignore[index,union-attr,operator]
    model.activation_checkpointing = True
    before = {name: t.clone() for name, t in model.model.named_buffers()}
    opt = SparseSAM(model, torch.optim.SGD(model.parameters(), lr=0.1), rho=0.1)
    opt.step(loss_fn, batches(1, 4)[0])
    after = dict(model.model.named_buffers())
    counts = {name: int(t - before[name]) for name, t in after.items() if name.endswith("num_batches_tracked")}
    assert {name for name, count in counts.items() if count != 1} == {"layer1.0.bn1.num_batches_tracked"}
    assert counts["layer1.0.bn1.num_batches_tracked"] == 0
    assert all(torch.isfinite(t).all() for t in after.values())
    assert {id(t) for t in after.values()} == {id(t) for t in dict(model.model.named_buffers()).values()}

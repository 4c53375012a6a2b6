"""Models, batches and changes of every kind, in pairs, equal the step that is written out slowly.

What a model is (dtype, tied or shared weights, checkpointing, a copy, tokens before samples), how batches look, how
groups are made and what is changed after the optimizer was built: each value of each axis with each of the others.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ssam_scale import Depth, Fresh, Named, Scored, SparseSAM
from ssam_scale.masks import Mask
from ssam_scale.perturbation import Stage, StagedModel
from ssam_scale.perturbation.reference import first_samples, reference_step
from tests.support.masks import whole_mask
from tests.support.pairs import pairwise

RHO, SIZE, TOKENS, WIDTH, CLASSES = 0.2, 6, 5, 8, 4

MASKS: dict[str, Callable[[], Mask | None]] = {
    "all": lambda: None,
    "cut": lambda: Depth(0.5),
    "moving cut": lambda: Depth(seed=1),
    "element": lambda: Scored("element", 0.5, score="weight"),
    "row": lambda: Scored("row", 0.5, score="weight"),
    "named": lambda: Named("blocks.2|head"),
}
AXES = {
    "mask": list(MASKS),
    "layout": ["samples first", "tokens first"],
    "batch": ["tuple", "dictionary", "nested", "keyword"],
    "checkpointing": ["none", "ours", "timm's", "torch's"],
    "groups": ["one", "two radii", "one left alone"],
    "copied": ["no", "the model", "the stages"],
    "dtype": ["float32", "float64"],
    "sharing": ["none", "tied", "a block used twice", "a block in two places"],
    "changed": ["nothing", "a layer replaced", "layers unfrozen", "a layer added"],
    "fraction": ["1", "0.5"],
}


class Network(nn.Module):
    """A stem, four residual blocks that mix tokens, and a head: (samples, tokens, width) to classes."""

    def __init__(self, case: Mapping[str, str]) -> None:
        super().__init__()
        self.case = dict(case)
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.head = nn.Linear(WIDTH, CLASSES)
        if case["sharing"] == "tied":
            self.blocks[3].weight = self.blocks[1].weight
        elif case["sharing"] == "a block in two places":
            self.blocks[3] = self.blocks[0]

    def begin(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        return x.transpose(0, 1) if self.case["layout"] == "tokens first" else x

    def block(self, index: int, x: Tensor) -> Tensor:
        samples = 1 if self.case["layout"] == "tokens first" else 0
        for _ in range(2 if self.case["sharing"] == "a block used twice" and index == 2 else 1):
            x = x + torch.tanh(self.blocks[index](x)) + x.mean(1 - samples, keepdim=True)
        return x

    def end(self, x: Tensor) -> Tensor:
        return self.head(x.mean(0 if self.case["layout"] == "tokens first" else 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.begin(x)
        for index in range(4):
            x = self.block(index, x)
        return self.end(x)


def in_stages(model: Any, case: Mapping[str, str]) -> StagedModel:
    def block(index: int) -> Callable[[Tensor], Tensor]:
        if case["checkpointing"] == "torch's":
            return lambda x: checkpoint(model.block, index, x, use_reentrant=False)
        return lambda x: model.block(index, x)

    blocks = [Stage(f"blocks.{i}", model.blocks[i], block(i)) for i in range(4)]
    first, last = Stage("stem", model.stem, model.begin), Stage("head", model.head, model.end)
    staged = StagedModel(model, [first, *blocks, last], activation_checkpointing=case["checkpointing"] == "ours")
    if case["checkpointing"] == "timm's":
        model.grad_checkpointing = True
    return staged


def batches_of(case: Mapping[str, str]) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    dtype = getattr(torch, case["dtype"])
    return [
        (
            torch.randn(SIZE, TOKENS, WIDTH, generator=generator).to(dtype),
            torch.randint(CLASSES, (SIZE,), generator=generator),
        )
        for _ in range(4)
    ]


def packed(x: Tensor, y: Tensor, case: Mapping[str, str]) -> Any:
    return {
        "tuple": (x, y),
        "dictionary": {"x": x, "y": y},
        "nested": {"inputs": [{"x": x}], "labels": (y, 3)},
        "keyword": ({"x": x}, y),
    }[case["batch"]]


def loss_of(case: Mapping[str, str]) -> Callable[[Any, Any], Tensor]:
    def loss_fn(forward: Any, batch: Any) -> Tensor:
        if case["batch"] == "tuple":
            return F.cross_entropy(forward(batch[0]), batch[1])
        if case["batch"] == "dictionary":
            return F.cross_entropy(forward(batch["x"]), batch["y"])
        if case["batch"] == "nested":
            return F.cross_entropy(forward(batch["inputs"][0]["x"]), batch["labels"][0])
        return F.cross_entropy(forward(**batch[0]), batch[1])

    return loss_fn


def groups_of(model: nn.Module, case: Mapping[str, str]) -> list[dict[str, Any]]:
    every = list(model.parameters())
    radii = {"one": (RHO,), "two radii": (RHO, RHO / 3), "one left alone": (RHO, 0.0)}[case["groups"]]
    return [{"params": every[i :: len(radii)], "rho": r} for i, r in enumerate(radii)]


def change(model: Any, optimizer: torch.optim.Optimizer, case: Mapping[str, str], step: int) -> None:
    """What a user does to a model between two steps, and to its optimizer."""
    dtype = getattr(torch, case["dtype"])
    if case["changed"] == "layers unfrozen":
        model.blocks.requires_grad_(step >= 1)
        model.stem.requires_grad_(step < 2)
    elif case["changed"] in ("a layer replaced", "a layer added") and step == 2:
        torch.manual_seed(7)
        new = nn.Linear(WIDTH, CLASSES).to(dtype)
        old = {id(p) for p in model.head.parameters()}
        if case["changed"] == "a layer replaced":
            model.head.weight, model.head.bias = new.weight, new.bias
        else:
            model.head.extra = nn.Parameter(torch.full((CLASSES,), 0.1, dtype=dtype))
            model.head.register_forward_hook(lambda head, inputs, output: output * (1 + head.extra))
            old = set()
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in old]
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        optimizer.add_param_group({"params": [p for p in model.head.parameters() if id(p) not in known], "rho": RHO})


def refused(case: Mapping[str, str]) -> bool:
    """Tokens before samples: the samples of an ascent cannot be told in what a shared prefix put out."""
    return case["fraction"] != "1" and case["layout"] == "tokens first"


CASES = {", ".join(v for v in case.values()): case for case in pairwise(AXES)}


def test_a_share_of_a_batch_is_a_whole_number_where_it_is_one() -> None:
    """0.29 of 100 were 28: the product of floats is a little below 29."""
    cases = {(100, 0.29): 29, (100, 0.57): 57, (99, 1 / 3): 33, (100, 0.333): 33, (64, 0.999): 63, (3, 0.1): 1}
    assert {case: first_samples(*case) for case in cases} == cases
    assert all(first_samples(n, k / n) == k for n in range(1, 300) for k in range(1, n + 1))
    seen = []
    model = nn.Linear(4, 2)
    opt = SparseSAM(model, torch.optim.SGD(model.parameters(), lr=0.1), direction=Fresh(0.29))

    def loss_fn(forward: Any, batch: Tensor) -> Tensor:
        seen.append(len(batch))
        return cast(Tensor, forward(batch).square().mean())

    opt.step(loss_fn, torch.ones(100, 4))
    assert seen == [29, 100]


@pytest.mark.parametrize("name", CASES)
def test_pairs_of_axes_equal_the_reference(name: str) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    model = Network(case).to(getattr(torch, case["dtype"]))
    theirs = copy.deepcopy(model)
    staged = in_stages(copy.deepcopy(model) if case["copied"] == "the model" else model, case)
    if case["copied"] == "the stages":
        staged = copy.deepcopy(staged)
    mine: Any = staged.model
    if case["changed"] == "layers unfrozen":
        for each in (mine, theirs):
            each.blocks.requires_grad_(False)
    base = torch.optim.SGD(groups_of(mine, case), lr=0.1, momentum=0.9)
    slow = torch.optim.SGD(groups_of(theirs, case), lr=0.1, momentum=0.9)
    opt = SparseSAM(staged, base, mask=MASKS[case["mask"]](), direction=Fresh(float(case["fraction"])))
    loss_fn = loss_of(case)
    if opt.refresh_is_due:
        opt.refresh()
    for step, (x, y) in enumerate(batches_of(case)):
        change(mine, base, case, step)
        change(theirs, slow, case, step)
        if case["changed"] != "nothing" and opt.mask.__class__.__name__ == "Scored" and step in (1, 2):
            opt.refresh()
        mask, batch = whole_mask(opt), packed(x, y, case)
        if refused(case) and opt.resolve().shares_prefix:
            with pytest.raises(ValueError, match="one row a sample"):
                opt.step(loss_fn, batch)
            return
        opt.step(loss_fn, batch)
        names = {id(p): n for n, p in theirs.named_parameters()}
        rho = {names[id(p)]: g["rho"] for g in slow.param_groups for p in g["params"]}
        part = first_samples(SIZE, float(case["fraction"]))
        reference_step(
            theirs,
            slow,
            loss_fn,
            batch,
            rho=rho,
            mask=mask,
            norm="masked",
            ascent_batch=packed(x[:part], y[:part], case),
        )
        # Sums in another order, which is the processor's: units in the last place; a radius of 0.2 over a short
        # gradient makes tens of them, momentum carries them on. In float64 the same steps agree to rounding.
        atol = 5e-6 if case["dtype"] == "float32" else 1e-13
        for (n, a), b in zip(mine.named_parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=atol, msg=lambda m, n=n, s=step: f"step {s}, {n}: {m}")
    assert opt.steps == 4


def test_every_pair_of_values_is_there() -> None:
    assert 30 <= len(CASES) <= 90
    for one in AXES:
        for other in AXES:
            if one < other:
                seen = {(case[one], case[other]) for case in CASES.values()}
                assert len(seen) == len(AXES[one]) * len(AXES[other])


def test_nothing_is_warned_of_in_ordinary_training() -> None:
    case = {axis: values[0] for axis, values in AXES.items()}
    model = Network(case)
    opt = SparseSAM(in_stages(model, case), torch.optim.SGD(model.parameters(), lr=0.1), rho=RHO)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for x, y in batches_of(case):
            opt.step(loss_of(case), packed(x, y, case))

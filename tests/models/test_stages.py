"""A network in stages computes what it computes, cut anywhere."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from ssam_scale import SparseSAM
from tests.support.networks import IMAGE, SMALL, batches, loss_fn, small_network

# isort: split
import timm


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("resnet", {}),
        ("vit", {"pos_drop_rate": 0.2, "drop_path_rate": 0.3}),
        ("vit", {"global_pool": "avg", "class_token": False}),
        ("convnext", {}),
        *((family, options) for family, (_, _, options) in SMALL.items()),
    ],
)
def test_prefix_and_suffix_are_the_network(family: str, options: dict[str, Any]) -> None:
    staged = small_network(family, **options).train()
    images = torch.randn(4, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(0))

    def run(cut: int | None) -> torch.Tensor:
        torch.manual_seed(1)
        for module in staged.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.reset_running_stats()
        if cut is None:
            return staged.model(images)
        return staged(staged(images, stop=cut), start=cut)

    expected = run(None)
    for cut in range(len(staged.stages) + 1):
        assert torch.equal(run(cut), expected), cut


@pytest.mark.parametrize("family", SMALL)
def test_every_parameter_belongs_to_the_stage_that_uses_it(family: str) -> None:
    staged = small_network(family)
    staged.eval()
    images = torch.randn(2, 3, IMAGE, IMAGE)
    owner = staged.stages_of_parameters()
    hidden = images
    for index in range(len(staged.stages)):
        after = staged(hidden, start=index, stop=index + 1)
        used = torch.autograd.grad(after.sum(), list(staged.model.parameters()), allow_unused=True)
        names = {name for (name, _), g in zip(staged.model.named_parameters(), used, strict=True) if g is not None}
        assert names == {name for name, stages in owner.items() if stages == (index,)}
        hidden = after.detach()


def new_head(model: Any) -> None:
    """One of three classes."""
    if hasattr(model, "reset_classifier"):
        model.reset_classifier(3)
    elif hasattr(model, "fc"):
        model.fc = torch.nn.Linear(model.fc.in_features, 3)
    else:
        model.heads = torch.nn.Linear(model.hidden_dim, 3)


def block_replaced(model: Any) -> None:
    blocks = model.blocks if hasattr(model, "blocks") else model.layer4
    blocks[1] = copy.deepcopy(blocks[1])


def frozen_batchnorm(model: Any) -> None:
    timm.utils.model.freeze(model, ["bn1"], include_bn_running_stats=True)


REPLACED: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "a block": ("vit", block_replaced, r"blocks.1 of the model has become another module \(Block\)"),
    "a residual block": ("resnet", block_replaced, r"layer4.1 of the model has become another module \(BasicBlock\)"),
    "a layer of blocks": (
        "resnet",
        lambda m: setattr(m, "layer4", copy.deepcopy(m.layer4)),
        "layer4.0 of the model has",
    ),
    "a block, wrapped": (
        "vit",
        lambda m: m.blocks.__setitem__(1, checkpoint_wrapper(m.blocks[1])),
        r"blocks.1 of the model has become another module \(CheckpointWrapper\)",
    ),
    "the stem": (
        "resnet",
        lambda m: setattr(m, "conv1", copy.deepcopy(m.conv1)),
        "layer1.0 runs a Conv2d that the model",
    ),
    "the norm": (
        "vit",
        lambda m: setattr(m, "norm", torch.nn.LayerNorm(32)),
        "runs a LayerNorm that the model has not",
    ),
    "frozen BatchNorm": (
        "resnet",
        frozen_batchnorm,
        "layer1.0 runs a BatchNorm2d that the model has not, or not any more",
    ),
    "SyncBatchNorm": (
        "resnet",
        timm.layers.convert_sync_batchnorm,
        "layer1.0 runs a BatchNorm2d that the model has not",
    ),
}


@pytest.mark.parametrize("when", ["before the optimizer", "after it"])
@pytest.mark.parametrize("what", REPLACED)
def test_stages_of_modules_that_were_replaced_are_refused(what: str, when: str) -> None:
    family, replace, told = REPLACED[what]
    model = small_network(family)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    opt = SparseSAM(model, base) if when == "after it" else None
    replace(model.model)
    base.param_groups[0]["params"] = list(model.parameters())
    with pytest.raises(ValueError, match=f"{told}.*make the StagedModel after that"):
        SparseSAM(model, base) if opt is None else opt.step(loss_fn, batches(1, 4)[0])


@pytest.mark.parametrize("family", SMALL)
def test_a_new_head_is_run(family: str) -> None:
    model = small_network(family)
    SparseSAM(model, torch.optim.SGD(model.parameters(), lr=0.1))
    new_head(model.model)
    images = batches(1, 4)[0][0]
    assert model(images).shape == (4, 3)
    assert torch.equal(model.eval()(images), model.model(images))
    SparseSAM(model, torch.optim.SGD(model.parameters(), lr=0.1))

"""A network in stages computes what it computes, cut anywhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.networks import IMAGE, small_network


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("resnet", {}),
        ("resnet", {"drop_rate": 0.3, "drop_path_rate": 0.3}),
        ("vit", {"pos_drop_rate": 0.2, "drop_path_rate": 0.3}),
        ("vit", {"global_pool": "avg", "class_token": False}),
        ("convnext", {}),
        ("convnext", {"drop_rate": 0.3, "drop_path_rate": 0.3, "conv_mlp": True}),
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


@pytest.mark.parametrize("family", ["resnet", "vit", "convnext"])
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

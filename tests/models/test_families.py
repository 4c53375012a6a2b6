"""The families that can be cut: which models of timm's registry are of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from ssam_scale.models import FAMILIES, stages_of

# Of each module of timm's, the first and the last by name: the others are built by the same function.
SOME = [
    (family, name)
    for family, entry in FAMILIES.items()
    for module in entry.value.modules
    for models in [replace(entry.value, modules=(module,)).models()]
    for name in (models[0], models[-1])
]


def built(name: str) -> nn.Module:
    import timm

    with torch.device("meta"):
        return timm.create_model(name)


@pytest.mark.parametrize(("family", "name"), SOME)
def test_models_of_a_family_are_of_its_class_and_have_stages(family: str, name: str) -> None:
    model = built(name)
    assert type(model).__name__ == family
    stages = stages_of(model)
    assert len(stages) >= 4
    assert len({stage.name for stage in stages}) == len(stages)


def test_what_is_left_out_is_of_another_class() -> None:
    distilled = "deit_tiny_distilled_patch16_224"
    assert type(built(distilled)).__name__ not in FAMILIES
    assert not any(distilled in entry.value.models() for entry in FAMILIES.values())
    assert "resnet18" in FAMILIES["ResNet"].value.models("18")
    assert FAMILIES["ResNet"].value.models("no such word") == []

"""The families that can be cut: which models are of them, and that each is its stages, one after another."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from ssam_scale.errors import UserError
from ssam_scale.models import FAMILIES, check_stages, staged, stages_of
from ssam_scale.perturbation import StagedModel
from tests.support.networks import IMAGE, SMALL

# isort: split
import timm
import torchvision

# Of each module of timm's, the first and the last by name: the others are built by the same function.
SOME = [
    (family, name)
    for family, entry in FAMILIES.items()
    for module in entry.value.modules
    for models in [replace(entry.value, modules=(module,)).models()]
    for name in (models[0], models[-1])
]
# What a model's own arguments make of it, and not its family.
REFUSED = {"rope_mixed": "share one parameter of rotary positions", "sapiens2": "positions are drawn anew"}


def built(name: str, **kwargs: Any) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = timm.create_model(name, **kwargs)
        return model


@pytest.mark.parametrize(("family", "name"), SOME)
def test_models_of_a_family_are_of_its_class_and_have_stages(family: str, name: str) -> None:
    model = built(name)
    assert type(model).__name__ == family
    stages = stages_of(model)
    assert len(stages) >= 4
    assert len({stage.name for stage in stages}) == len(stages)


def what_runs(model: nn.Module, forward: nn.Module, images: torch.Tensor) -> tuple[torch.Size, list[nn.Module]]:
    """The shape of what comes out, and the modules with weights of their own that are called for it, in order."""
    ran: list[nn.Module] = []
    with torch.no_grad(), ExitStack() as hooks:
        for module in model.modules():
            # Not the model, which a class token belongs to: its stages run, and it does not.
            if module is not model and any(True for _ in module.parameters(recurse=False)):
                handle = module.register_forward_pre_hook(lambda module, _: ran.append(module))
                hooks.callback(handle.remove)
        return forward(images).shape, ran


def test_every_family_is_tested_on_a_small_network() -> None:
    assert {family for family, _, _ in SMALL.values()} == set(FAMILIES)


@pytest.mark.parametrize("small", SMALL)
@pytest.mark.parametrize(
    "dropping", [pytest.param(False, marks=pytest.mark.slow, id="plain"), pytest.param(True, id="dropping")]
)
def test_a_family_is_its_stages_bit_for_bit(small: str, dropping: bool) -> None:
    torch.manual_seed(0)
    family, make, options = SMALL[small]
    model = make(**(options if dropping else {}))
    assert type(model) is FAMILIES[family].value.cls
    check_stages(model, stages_of(model), (4, 3, IMAGE, IMAGE))


def test_positions_that_rotate_are_those_of_square_images_of_any_size() -> None:
    model = SMALL["dinov3"][1]()
    stages = stages_of(model)
    for side in (32, 48):
        check_stages(model, stages, (2, 3, side, side))
    with pytest.raises(RuntimeError, match=r"need square images, not \(2, 3, 32, 48\)"):
        stages[0].forward(torch.zeros(2, 3, 32, 48))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SMALL["beit"][1](use_shared_rel_pos_bias=True), "Beit .*share one relative position bias"),
        (lambda: SMALL["eva02"][1](rope_type="mixed"), "Eva .*share one parameter of rotary positions"),
        (lambda: SMALL["eva02"][1](patch_drop_rate=0.2), "Eva .*leave patch_drop_rate out"),
        (lambda: SMALL["dinov3"][1](rope_rescale_coords=2.0), "Eva .*set rope_shift_coords"),
        (lambda: SMALL["swin"][1](depths=(1, 0, 1)), r"SwinTransformer .*layers\.1 was built without a block"),
        (lambda: SMALL["vit"][1](depth=0), "VisionTransformer .*without a block"),
        (lambda: timm.create_model("test_resnet", features_only=True), "FeatureListNet, .*features_only=True"),
        (lambda: timm.create_model("test_vit", features_only=True), "FeatureGetterNet, .*features_only=True"),
        (lambda: timm.create_model("test_efficientnet", features_only=True), "EfficientNetFeatures, .*features_only"),
        (lambda: timm.create_model("test_byobnet"), r"ByobNet has no stages.*timm's Beit, .*stages\.0 to stages\.3"),
        (lambda: torchvision.models.squeezenet1_1(), "SqueezeNet has no stages"),
        (lambda: type("ResNet", (nn.Linear,), {})(1, 1), "tests's ResNet has no stages"),
    ],
    ids=[
        "a shared bias",
        "trained positions",
        "patches dropped",
        "positions drawn",
        "a layer without blocks",
        "no block",
        "features of a ResNet",
        "features of a ViT",
        "features of an EfficientNet",
        "no family of timm's",
        "no family of torchvision's",
        "a class of the same name",
    ],
)
def test_what_is_no_sequence_of_blocks_is_refused_and_is_one_stage(make: Callable[[], nn.Module], message: str) -> None:
    model = make()
    with pytest.raises(UserError, match=message):
        stages_of(model)
    assert [stage.name for stage in staged(model).stages] == [""]


def test_names_of_models() -> None:
    distilled = "deit_tiny_distilled_patch16_224"
    assert [family for family, entry in FAMILIES.items() if distilled in entry.value.models()] == [
        "VisionTransformerDistilled"
    ]
    assert "resnet18" in FAMILIES["ResNet"].value.models("18")
    assert FAMILIES["ResNet"].value.models("no such word") == []
    assert FAMILIES["torchvision.ResNet"].value.models() == []


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", [name for name, entry in FAMILIES.items() if entry.value.modules])
def test_every_model_of_a_family_is_of_its_class_and_has_all_weights_in_stages(family: str) -> None:
    """On the device meta: whether each block takes what the one before it puts out, and no module is forgotten."""
    for name in FAMILIES[family].value.models():
        model = built(name)
        assert type(model).__name__ == family, name
        if (reason := next((told for part, told in REFUSED.items() if part in name), None)) is not None:
            with pytest.raises(UserError, match=reason):
                stages_of(model)
            continue
        network = StagedModel(model, stages_of(model))
        side = model.pretrained_cfg["input_size"][-1]
        images = torch.empty(2, 3, side, side, device="meta")
        assert what_runs(model, model, images) == what_runs(model, network, images), name


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", [name for name, entry in FAMILIES.items() if entry.value.modules])
def test_every_small_model_of_a_family_is_its_stages_bit_for_bit(family: str) -> None:
    """Of the models below 8 million weights, with stochastic depth where they take it."""
    for name in FAMILIES[family].value.models():
        if any(part in name for part in REFUSED) or sum(p.numel() for p in built(name).parameters()) > 8e6:
            continue
        torch.manual_seed(0)
        cls = FAMILIES[family].value.cls
        takes = "drop_path_rate" in inspect.signature(cls.__init__).parameters
        model = timm.create_model(name, num_classes=10, **({"drop_path_rate": 0.1} if takes else {}))
        side = model.pretrained_cfg["input_size"][-1]
        check_stages(model, stages_of(model), (2, 3, side, side))

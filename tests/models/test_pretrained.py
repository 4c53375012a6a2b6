"""Weights to start from: however people keep them, the same network comes out, or a line that says why not."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ssam_scale.errors import UserError
from ssam_scale.models import Loaded, load_pretrained
from ssam_scale.models.torchvision_ops import ensure_torchvision
from tests.support.checkout import ROOT

ensure_torchvision()
import timm  # noqa: E402

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
RESNET = {"channels": [8, 8, 8, 8], "stem_width": 8}
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def vit(seed: int, **given: Any) -> nn.Module:
    torch.manual_seed(seed)
    network: nn.Module = timm.create_model("vit_tiny_patch16_224", **{"num_classes": 5, **VIT, **given})
    for parameter in network.parameters():  # nothing is zero, as what is new may be
        nn.init.normal_(parameter, std=0.2)
    return network.eval()


def resnet(seed: int, **given: Any) -> nn.Module:
    torch.manual_seed(seed)
    network: nn.Module = timm.create_model("resnet18", **{"num_classes": 5, **RESNET, **given})
    with torch.no_grad():
        network.train()(IMAGES)  # running statistics of its own
    return network.eval()


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


# Of a state_dict, what a trainer writes by `torch.save`.
WRAPPINGS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "as it is": lambda own: own,
    "timm and DeiT": lambda own: {"model": own, "epoch": 3, "optimizer": {"state": {}}},
    "timm's average": lambda own: {"state_dict": dict.fromkeys(own, torch.zeros(1)), "state_dict_ema": own},
    "DeiT's average": lambda own: {"model": dict.fromkeys(own, torch.zeros(1)), "model_ema": own},
    "DataParallel": lambda own: {"state_dict": prefixed("module.", own), "epoch": 90},
    "compiled": lambda own: prefixed("_orig_mod.", own),
    "Lightning": lambda own: {"state_dict": prefixed("model.", own), "pytorch-lightning_version": "2"},
    "compiled within DataParallel": lambda own: {"model": prefixed("module._orig_mod.", own)},
    "DINO": lambda own: {
        "student": prefixed("module.backbone.", {name: tensor + 1.0 for name, tensor in own.items()}),
        "teacher": {**prefixed("backbone.", own), "head.mlp.0.weight": torch.zeros(4, 4)},
    },
}


@pytest.mark.parametrize("make", [vit, resnet], ids=["vit", "resnet"])
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_as_trainers_keep_them(wrapping: str, make: Callable[[int], nn.Module], tmp_path: Path) -> None:
    source, model = make(1), make(2)
    torch.save(WRAPPINGS[wrapping](source.state_dict()), tmp_path / "w.pth")
    assert not torch.equal(model(IMAGES), source(IMAGES))
    loaded = load_pretrained(model, tmp_path / "w.pth")
    assert torch.equal(model(IMAGES), source(IMAGES))
    assert (loaded.new, loaded.tensors) == ((), len(source.state_dict()))
    assert str(loaded).startswith(f"{loaded.tensors} tensors from {tmp_path / 'w.pth'}")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_in_a_folder(name: str, tmp_path: Path) -> None:
    source, model = vit(1), vit(2)
    (save_file if name.endswith("safetensors") else torch.save)(source.state_dict(), tmp_path / name)
    load_pretrained(model, tmp_path)
    assert torch.equal(model(IMAGES), source(IMAGES))


def test_a_head_of_another_size_is_new(tmp_path: Path) -> None:
    for make, head in ((vit, "head"), (resnet, "fc")):
        source, model = make(1), make(2, num_classes=7)
        torch.save(source.state_dict(), tmp_path / "w.pth")
        before = model.get_submodule(head).weight.clone()
        loaded = load_pretrained(model, tmp_path / "w.pth")
        assert loaded.new == (f"{head}.weight", f"{head}.bias")
        assert "new: " + ", ".join(loaded.new) in str(loaded)
        assert torch.equal(model.get_submodule(head).weight, before)
        assert torch.equal(model.forward_features(IMAGES), source.forward_features(IMAGES))


def test_positions_are_resampled(tmp_path: Path) -> None:
    source, model = vit(1), vit(2, img_size=48)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    assert load_pretrained(model, tmp_path / "w.pth").new == ()
    grid, wanted = model.pos_embed[:, 1:].reshape(1, 6, 6, -1), source.pos_embed[:, 1:].reshape(1, 4, 4, -1)
    resized = nn.functional.interpolate(
        wanted.permute(0, 3, 1, 2), (6, 6), mode="bicubic", antialias=True, align_corners=False
    )
    torch.testing.assert_close(grid.permute(0, 3, 1, 2), resized)


def test_an_encoder_without_its_decoder(tmp_path: Path) -> None:
    """MAE's file: what decodes is not used, and the head is new."""
    source, model = vit(1), vit(2)
    encoder = {name: tensor for name, tensor in source.state_dict().items() if not name.startswith("head.")}
    decoder = {"decoder_embed.weight": torch.zeros(3, 32), "mask_token": torch.zeros(1, 1, 3)}
    torch.save({"model": {**encoder, **decoder}}, tmp_path / "w.pth")
    loaded = load_pretrained(model, tmp_path / "w.pth")
    assert loaded.new == ("head.weight", "head.bias")
    assert loaded.unused == ("decoder_embed.weight",)  # timm's filter has dropped the other already
    assert torch.equal(model.forward_features(IMAGES), source.forward_features(IMAGES))


def test_torchvisions_networks_put_out_the_same(tmp_path: Path) -> None:
    from torchvision.models import VisionTransformer, resnet18

    torch.manual_seed(1)
    theirs: list[tuple[nn.Module, nn.Module]] = [
        (resnet18(num_classes=5), timm.create_model("resnet18", num_classes=5)),
        (VisionTransformer(32, 8, 2, 2, 32, 128, num_classes=5), vit(2)),
    ]
    for source, model in theirs:
        if isinstance(source, VisionTransformer):
            nn.init.normal_(source.heads.head.weight)  # zeros, which any network would put out
        torch.save(source.state_dict(), tmp_path / "w.pth")
        assert load_pretrained(model, tmp_path / "w.pth").new == ()
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(IMAGES), source.eval()(IMAGES), atol=1e-5, rtol=1e-5)


class Mine:
    """What only a class of one's own can be read with."""


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "another network": (
        lambda path: torch.save(resnet(1).state_dict(), path),
        r"weights of another network \(.*\); set model\.name to that",
    ),
    "of other widths": (
        lambda path: torch.save(vit(1, embed_dim=64).state_dict(), path),
        r"another network \(\d+ tensors have other shapes: cls_token 1×1×64 here 1×1×32, .* and \d+ more\)",
    ),
    "nothing in it": (lambda path: torch.save({}, path), r"another network \(it has 0% of the network's numbers"),
    "objects": (lambda path: torch.save({"model": Mine()}, path), r"holds more than tensors, .*: torch\.save\(model"),
    "a list": (lambda path: torch.save([torch.ones(2)], path), r"holds a list, and tensors by name are needed"),
    "text": (lambda path: path.write_text("weights"), r"cannot be read as weights|holds more than tensors"),
    "nothing at all": (lambda path: path.write_bytes(b""), r"cannot be read as weights"),
    "not there": (lambda path: None, r"no such file"),
    "an empty folder": (
        lambda path: path.mkdir(),
        r"a folder without model\.safetensors or pytorch_model\.bin or checkpoint\.pth$",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_taken_is_one_line(what: str, tmp_path: Path) -> None:
    make, message = REFUSED[what]
    path, model = tmp_path / "w.pth", vit(2)
    make(path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match=rf"^model\.pretrained {path}: .*{message}") as caught:
        load_pretrained(model, path)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_damaged_file_of_safetensors(tmp_path: Path) -> None:
    save_file(vit(1).state_dict(), tmp_path / "w.safetensors")
    whole = (tmp_path / "w.safetensors").read_bytes()
    for content in (whole[: len(whole) // 2], b"\0" * 8 + whole[8:], whole[:7]):
        (tmp_path / "w.safetensors").write_bytes(content)
        with pytest.raises(UserError, match=r"w\.safetensors: cannot be read as weights \(.*\); copy it again"):
            load_pretrained(vit(2), tmp_path / "w.safetensors")


def test_images_of_other_colours_are_noted() -> None:
    loaded = Loaded("a hub", 3, (), (), ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)))
    assert loaded.note((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)) is None
    assert loaded.note((0.485, 0.456, 0.406), (0.5, 0.5, 0.5)) == (
        "weights from a hub were trained with data.mean=[0.5, 0.5, 0.5] and data.std=[0.5, 0.5, 0.5], and here images "
        "are normalised otherwise"
    )
    assert Loaded("a file", 3, (), ()).note((0.5,), (0.5,)) is None


# ---------------------------------------------------------------------------------------------------------------- a hub


def in_cache(home: Path, hub: str, tensors: dict[str, Tensor]) -> None:
    """A repository of weights as the hub's library keeps it."""
    folder = home / "hub" / f"models--{hub.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
    save_file(tensors, folder / "snapshots" / ("0" * 40) / "model.safetensors")


@pytest.mark.slow
def test_of_the_hubs_cache_or_where_to_put_it(tmp_path: Path) -> None:
    """Without a network: what is in the cache is taken, by name and tag; what is not is one line."""
    torch.manual_seed(1)
    source = timm.create_model("resnet18")
    in_cache(tmp_path, "timm/resnet18.a1_in1k", source.state_dict())
    code = """
import sys
from ssam_scale.errors import UserError
from ssam_scale.models import load_pretrained
import timm
for name in sys.argv[1:]:
    model = timm.create_model(name, num_classes=1000 if "." in name else 4)
    try:
        print(name, "|", load_pretrained(model, None), "|", float(model.conv1.weight.detach().sum()))
    except UserError as error:
        print(name, "|", error)
"""
    names = ["resnet18.a1_in1k", "resnet18", "resnet18.fb_ssl_yfcc100m_ft_in1k", "resnet200"]
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, *names], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(" | ", 1) for line in done.stdout.splitlines())
    total = float(source.conv1.weight.detach().sum())
    assert lines["resnet18.a1_in1k"] == f"122 tensors from timm/resnet18.a1_in1k of the hub | {total}"
    assert lines["resnet18"] == f"120 tensors from timm/resnet18.a1_in1k of the hub; new: fc.weight, fc.bias | {total}"
    missing = lines["resnet18.fb_ssl_yfcc100m_ft_in1k"]
    assert (
        "the weights of resnet18.fb_ssl_yfcc100m_ft_in1k are not in the cache, and could not be downloaded" in missing
    )
    assert "`hf download timm/resnet18.fb_ssl_yfcc100m_ft_in1k`" in missing
    assert lines["resnet200"].endswith("has no weights for resnet200; give a file: model.pretrained=PATH")

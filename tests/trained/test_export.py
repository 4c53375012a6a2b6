"""`ssam-scale export`: what others load has the logits of the network."""

from __future__ import annotations

import json
import shutil
import stat
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from ssam_scale.config.load import load
from ssam_scale.data import central_loader, open_images
from ssam_scale.errors import UserError
from ssam_scale.train.checkpoint import network_of
from ssam_scale.trained import FORMATS, Trained, export
from tests.support.runs import VIT, ssam_scale, write_config
from tests.support.short_run import ShortRun
from tests.support.tiers import few

pytestmark = pytest.mark.slow


def batch_of(run: ShortRun) -> Tensor:
    data = load(run.home / "run.yaml").data
    [(images, _)] = central_loader(open_images(run.data / "val.beton"), data, device=torch.device("cpu"), batch=20)
    return images


def logits_of(run: ShortRun, images: Tensor, *, averaged: bool = True) -> Tensor:
    with torch.no_grad():
        found: Tensor = network_of(run.checkpoint, load(run.home / "run.yaml"), averaged=averaged).eval()(images)
    return found


def test_timm_loads_the_folder_with_its_classes_and_preprocessing(
    run: ShortRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "deep/exported"
    assert ssam_scale("export", run.checkpoint, "-o", place) == 0
    assert "read back, its logits of 8 images of" in capsys.readouterr().out
    network = timm.create_model(f"local-dir:{place}", pretrained=True).eval()
    images = batch_of(run)
    with torch.no_grad():
        assert torch.equal(network(images), logits_of(run, images))
    config = network.pretrained_cfg
    assert list(config["label_names"]) == [f"n{label:08d}" for label in range(4)]
    preprocessing = timm.data.resolve_data_config({}, model=network)
    assert tuple(preprocessing["input_size"]) == (3, 32, 32)
    assert preprocessing["crop_pct"] == 0.875
    assert preprocessing["interpolation"] == "bilinear"
    assert tuple(preprocessing["mean"]) == (0.485, 0.456, 0.406)
    # And as a plain file of weights.
    arguments = json.loads((place / "config.json").read_text())["model_args"]
    plain = timm.create_model(
        "resnet18", num_classes=4, checkpoint_path=place / "model.safetensors", **arguments
    ).eval()
    with torch.no_grad():
        assert torch.equal(plain(images), logits_of(run, images))
    assert stat.S_IMODE((place / "model.safetensors").stat().st_mode) & stat.S_IRGRP
    # What is there already stays.
    assert ssam_scale("export", run.checkpoint, "-o", place) == 2
    assert "exported: is there already; name another folder" in capsys.readouterr().err
    # The raw weights are others.
    assert ssam_scale("export", run.checkpoint, "-o", tmp_path / "raw", "--no-ema") == 0
    raw = timm.create_model(f"local-dir:{tmp_path}/raw", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(raw(images), logits_of(run, images, averaged=False))


def test_a_program_of_torch_export_takes_batches_of_any_size(run: ShortRun, tmp_path: Path) -> None:
    place = tmp_path / "model.pt2"
    assert ssam_scale("export", run.checkpoint, "-o", place, "--format", "torch-export") == 0
    described = {"config.json": ""}
    program = torch.export.load(place, extra_files=described).module()
    images = batch_of(run)
    for count in (1, 2, 20):
        with torch.no_grad():
            # Fused operations may sum in another order: fp32.
            torch.testing.assert_close(program(images[:count]), logits_of(run, images[:count]), atol=1e-5, rtol=1e-5)
    assert json.loads(described["config.json"])["label_names"] == [f"n{label:08d}" for label in range(4)]


def test_onnx_runtime_takes_batches_of_any_size(run: ShortRun, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    place = tmp_path / "model.onnx"
    assert ssam_scale("export", run.checkpoint, "-o", place, "--format", "onnx") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    session = onnxruntime.InferenceSession(place, providers=["CPUExecutionProvider"])
    images = batch_of(run)
    for count in (1, 2, 20):
        [found] = session.run(["logits"], {"images": images[:count].numpy()})
        # Kernels of another library: fp32.
        torch.testing.assert_close(torch.from_numpy(found), logits_of(run, images[:count]), atol=1e-4, rtol=1e-4)
    assert json.loads(session.get_modelmeta().custom_metadata_map["mean"]) == [0.485, 0.456, 0.406]


MODELS: dict[str, dict[str, Any]] = {
    "vit": VIT,
    "convnext": {"name": "convnext_atto", "num_classes": 4, "kwargs": {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}},
    "swin": {
        "name": "swin_tiny_patch4_window7_224",
        "num_classes": 4,
        "kwargs": {"img_size": 32, "window_size": 4, "embed_dim": 24, "depths": [1, 1], "num_heads": [2, 2]},
    },
    "efficientnet": {"name": "efficientnet_lite0", "num_classes": 4},
    "mixer": {
        "name": "mixer_s32_224",
        "num_classes": 4,
        "kwargs": {"img_size": 32},
    },
    "beit": {
        "name": "beit_base_patch16_224",
        "num_classes": 4,
        "kwargs": {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
    },
}


@pytest.mark.parametrize("family", few(MODELS, "vit"))
@pytest.mark.parametrize("format", FORMATS)
def test_other_families(format: str, family: str, tmp_path: Path) -> None:
    if format == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    config = load(write_config(tmp_path / "run.yaml", tmp_path, store=False, model=MODELS[family]))
    network = timm.create_model(config.model.name, num_classes=4, **config.model.kwargs).eval()
    for buffer in network.buffers():
        if buffer.is_floating_point():
            buffer.add_(0.1)  # so that what is left out is seen
    done = export(Trained(network, config, [], "random weights", 8, "raw"), format, tmp_path / "out", None)
    assert done.difference <= done.tolerance
    assert "noise, for want of real ones" in done.of


class Branching(nn.Module):
    """What no tracer takes: a path that depends on the values of images."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 4)

    def forward(self, images: Tensor) -> Tensor:
        pooled = images.mean((2, 3))
        found: Tensor = self.head(pooled if float(pooled.sum()) > 0 else -pooled)
        return found


@pytest.mark.parametrize("format", ["torch-export", "onnx"])
def test_what_cannot_be_traced_is_a_line_and_leaves_nothing(format: str, tmp_path: Path) -> None:
    if format == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    config = load(write_config(tmp_path / "run.yaml", tmp_path, store=False))
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=f"--format {format}: torch .* does not take resnet18") as raised:
        export(Trained(Branching(), config, [], "random weights", 8, "raw"), format, tmp_path / "out/model")
    assert "\n" not in str(raised.value)
    assert list((tmp_path / "out").iterdir()) == []


def test_what_computes_something_else_when_read_back_is_not_written(run: ShortRun, tmp_path: Path) -> None:
    """One that multiplies by two where it is traced."""
    config = load(run.home / "run.yaml")
    network = network_of(run.checkpoint, config).eval()
    network.layer4[0].register_forward_hook(lambda *seen: seen[2] * (2.0 if torch.compiler.is_exporting() else 1.0))
    trained = Trained(network, config, [], "a network of two minds", 8, "raw")
    with pytest.raises(UserError, match="not written, because read back its logits of 8 images"):
        export(trained, "torch-export", tmp_path / "model.pt2")
    assert list(tmp_path.iterdir()) == []


MISUSES: dict[str, tuple[list[str], str]] = {
    "no such format": (
        ["-o", "{out}/m", "--format", "gguf"],
        "--format gguf: there are safetensors, onnx, torch-export",
    ),
    "a full folder": (["-o", "{out}"], "is there already; name another folder"),
    "a file for a folder": (["-o", "{out}/file"], "file: is there already; name another folder"),
    "a folder for a file": (["-o", "{out}", "--format", "torch-export"], "is a folder; name a file in it"),
    "a link for a file": (["-o", "{out}/link.pt2", "--format", "torch-export"], "link.pt2: is a link"),
    "below a file": (["-o", "{out}/file/m"], "file is not a folder"),
    "no folder": (["-o", "{out}/none/m.pt2", "--format", "torch-export"], "there is no folder {out}/none"),
    "no averages": (["-o", "{out}/m", "--ema"], "has no averaged weights"),
    "no such images": (["-o", "{out}/m", "--data", "{out}/none"], "none: no such file"),
}


@pytest.mark.parametrize("misuse", MISUSES)
def test_misuse_is_a_line_and_nothing_is_written(
    misuse: str, run: ShortRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("kept")
    (tmp_path / "link.pt2").symlink_to("/dev/null")
    checkpoint = run.checkpoint
    if misuse == "no averages":
        checkpoint = tmp_path / "soup"
        places = sorted(run.checkpoint.parent.glob("epoch_*"))
        assert ssam_scale("average", *places, "-o", checkpoint) == 0
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    arguments, said = MISUSES[misuse]
    assert ssam_scale("export", checkpoint, *(argument.format(out=tmp_path) for argument in arguments)) == 2
    error = capsys.readouterr().err
    assert said.format(out=tmp_path) in error
    assert error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_without_onnx_a_line_says_how_to_install_it(
    run: ShortRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("onnx", "onnxscript"):
        monkeypatch.setitem(sys.modules, name, None)  # what Python takes for "not to be found"
    assert ssam_scale("export", run.checkpoint, "-o", tmp_path / "m.onnx", "--format", "onnx") == 2
    error = capsys.readouterr().err
    assert "--format onnx: onnx, " in error
    assert "not installed; pip install 'ssam_scale[onnx]'" in error
    assert list(tmp_path.iterdir()) == []


def test_images_that_have_gone_are_no_reason_not_to_export(run: ShortRun, tmp_path: Path) -> None:
    shutil.copytree(run.checkpoint, tmp_path / "elsewhere")
    gone = f"data.val={tmp_path}/gone.beton"
    assert ssam_scale("export", tmp_path / "elsewhere", "-o", tmp_path / "out", gone) == 0

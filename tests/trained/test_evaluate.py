"""`ssam-scale evaluate` has the numbers of the run's own evaluation, and says more of them."""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ssam_scale.config.load import load
from ssam_scale.data import central_loader, open_images
from ssam_scale.train.checkpoint import network_of
from ssam_scale.train.checkpoint.files import read_state, state_text
from ssam_scale.trained.evaluate import calibration_error
from tests.support.damage import flipped
from tests.support.runs import ssam_scale, train_on_ranks, write_config
from tests.support.short_run import ShortRun
from tests.support.tiers import few

Evaluated = Callable[..., dict[str, Any]]


def logits_and_labels(run: ShortRun, *overrides: str, data: str = "val.beton") -> tuple[Tensor, Tensor]:
    """Of the averaged weights of the last checkpoint, by timm's network and the loader alone."""
    config = load(run.home / "run.yaml", overrides)
    place = Path(data) if ":" in data else run.data / data
    loader = central_loader(open_images(place), config.data, device=torch.device("cpu"), batch=8)
    network = network_of(run.checkpoint, config).eval()
    with torch.no_grad():
        found = [(network(images), labels) for images, labels in loader]
    return torch.cat([logits for logits, _ in found]), torch.cat([labels for _, labels in found])


def top1(logits: Tensor, labels: Tensor) -> float:
    return 100.0 * float((logits.argmax(1) == labels).double().mean())


@pytest.mark.slow
def test_it_is_bit_for_bit_what_the_run_recorded(run: ShortRun, evaluated: Evaluated) -> None:
    found = evaluated(run.checkpoint)
    assert (found["top1"], found["loss"]) == (run.metrics["val/top1"], run.metrics["val/loss"])
    assert (found["weights"], found["images"], found["top5"]) == ("averaged", 20, None)
    raw = evaluated(run.checkpoint, "--no-ema")
    assert (raw["top1"], raw["loss"]) == (run.metrics["val/raw_top1"], run.metrics["val/raw_loss"])
    assert raw["loss"] != found["loss"]


@pytest.mark.slow
def test_classes_and_confusions_add_up(run: ShortRun, evaluated: Evaluated, tmp_path: Path) -> None:
    picture = tmp_path / "confusions.svg"
    found = evaluated(run.checkpoint, "--picture", picture)
    logits, labels = logits_and_labels(run)
    assert [each["name"] for each in found["classes"]] == [f"n{label:08d}" for label in range(4)]
    for label, each in enumerate(found["classes"]):
        assert each["images"] == 5
        assert each["top1"] == pytest.approx(top1(logits[labels == label], labels[labels == label]))
    pairs = {(each["class"], each["taken_for"]): each["images"] for each in found["confusions"]}
    wrong = logits.argmax(1) != labels
    assert sum(pairs.values()) == int(wrong.sum())
    for (own, other), count in pairs.items():
        assert count == int(((labels == int(own[1:])) & (logits.argmax(1) == int(other[1:]))).sum())
    probabilities = logits.double().softmax(1).amax(1).numpy()
    assert found["calibration_error"] == pytest.approx(calibration_error(probabilities, (~wrong).numpy()))
    assert "n00000003" in picture.read_text()


@pytest.mark.slow
def test_a_run_a_folder_and_a_checkpoint_are_the_same(
    run: ShortRun, evaluated: Evaluated, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = evaluated(run.checkpoint)
    for place in (run.checkpoint.parent, run.id, run.name):
        assert evaluated(place, "--tracking-uri", run.store) == expected
    best = evaluated(run.checkpoint.parent, "--best", "loss")
    recorded = {
        path.name: json.loads((path / "state.json").read_text())["evaluation"]["loss"]
        for path in sorted(run.checkpoint.parent.glob("epoch_*"))
    }
    assert best["loss"] == min(recorded.values())
    assert Path(best["checkpoint"]).name == min(recorded, key=lambda name: recorded[name])
    assert ssam_scale("evaluate", run.checkpoint) == 0
    said = capsys.readouterr().out
    assert "4 of 4 classes scored" in said
    assert f"top-1 {run.metrics['val/top1']:.2f}%, validation loss {run.metrics['val/loss']:.4f}" in said


@pytest.mark.slow
def test_other_crops_and_flips(run: ShortRun, evaluated: Evaluated) -> None:
    changed = ["data.eval_resolution=48", "data.eval_crop_ratio=1.0"]
    logits, labels = logits_and_labels(run, *changed)
    found = evaluated(run.checkpoint, *changed)
    assert found["top1"] == top1(logits, labels)
    assert found["loss"] == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-6)
    # A file's images, and their mirror images.
    flips = evaluated(run.checkpoint, "data.eval_flip=true")
    images = [batch.images for batch in central_loader(
        open_images(run.data / "val.beton"), load(run.home / "run.yaml").data, device=torch.device("cpu"), batch=20
    )]  # fmt: skip
    network = network_of(run.checkpoint, load(run.home / "run.yaml")).eval()
    with torch.no_grad():
        both = 0.5 * (network(images[0]) + network(images[0].flip(-1)))
    assert flips["loss"] == pytest.approx(float(F.cross_entropy(both, labels)), rel=1e-6)
    assert flips["eval_flip"] is True


@pytest.mark.slow
def test_folders_and_shards_are_the_files_images(run: ShortRun, evaluated: Evaluated, tmp_path: Path) -> None:
    expected = evaluated(run.checkpoint)
    own = ("data", "scored")
    for place in (run.data / "val", f"folder:{run.data}/val"):
        found = evaluated(run.checkpoint, "--data", place)
        assert {k: v for k, v in found.items() if k not in own} == {k: v for k, v in expected.items() if k not in own}
    with tarfile.open(tmp_path / "val-0.tar", "w") as tar:
        for path in sorted((run.data / "val").rglob("*.JPEG")):
            label = tmp_path / f"{path.stem}.cls"
            label.write_text(path.parent.name)
            tar.add(path, f"{path.stem}.jpg")
            tar.add(label, label.name)
    found = evaluated(run.checkpoint, "--data", f"wds:{tmp_path}/val-0.tar")
    assert {k: v for k, v in found.items() if k not in own} == {k: v for k, v in expected.items() if k not in own}


@pytest.mark.slow
def test_of_some_classes_only_theirs_are_scored(run: ShortRun, evaluated: Evaluated, tmp_path: Path) -> None:
    """As of ImageNet-A and ImageNet-R, whose folders are 200 of the 1,000."""
    for name in ("n00000001", "n00000003"):
        shutil.copytree(run.data / "val" / name, tmp_path / "some" / name)
    logits, labels = logits_and_labels(run)
    of_them = torch.isin(labels, torch.tensor([1, 3]))
    logits, labels = logits[of_them][:, [1, 3]], (labels[of_them] == 3).long()
    found = evaluated(run.checkpoint, "--data", tmp_path / "some")
    assert found["scored"] == "2 of 4 classes scored, by name"
    assert found["top1"] == top1(logits, labels)
    assert found["loss"] == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-6)
    assert [each["name"] for each in found["classes"]] == ["n00000001", "n00000003"]


@pytest.mark.slow
def test_folders_that_are_numbered(run: ShortRun, evaluated: Evaluated, tmp_path: Path) -> None:
    """As those of ImageNetV2 are."""
    for label in (0, 2, 3):
        shutil.copytree(run.data / f"val/n{label:08d}", tmp_path / "numbered" / str(label))
        shutil.copytree(run.data / f"val/n{label:08d}", tmp_path / "named" / f"n{label:08d}")
    found, expected = (evaluated(run.checkpoint, "--data", tmp_path / name) for name in ("numbered", "named"))
    assert found["scored"] == "3 of 4 classes scored, whose numbers folders have as names"
    assert {**found, "data": "", "scored": ""} == {**expected, "data": "", "scored": ""}


@pytest.mark.slow
@pytest.mark.parametrize("form", ["by name", "in order"])
def test_several_labels_an_image(form: str, run: ShortRun, evaluated: Evaluated, tmp_path: Path) -> None:
    """As ReaL has them: any of them is right, and images without one do not count. They lie in one folder."""
    logits, labels = logits_and_labels(run)
    best = logits.argmax(1)
    folder = tmp_path / "flat"
    folder.mkdir()
    real: list[list[int]] = []
    for number, path in enumerate(sorted((run.data / "val").rglob("*.JPEG")), start=1):
        shutil.copy(path, folder / f"val_{number:08d}.JPEG")
        second = int(best[number - 1]) if number % 3 == 0 else (int(labels[number - 1]) + 1) % 4
        real.append([] if number % 5 == 0 else [int(labels[number - 1]), second])
    said = {f"val_{n:08d}.JPEG": found for n, found in enumerate(real, start=1)} if form == "by name" else real
    file = tmp_path / "real.json"
    file.write_text(json.dumps(said))
    found = evaluated(run.checkpoint, "--data", folder, "--labels", file)
    right = [int(b) in each for b, each in zip(best, real, strict=True) if each]
    assert found["top1"] == pytest.approx(100.0 * np.mean(right))
    assert (found["images"], found["without_label"], found["loss"], found["classes"]) == (16, 4, None, [])
    assert found["scored"] == "4 of 4 classes scored, by real.json; 4 images without a label do not count"


@pytest.mark.slow
def test_a_damaged_image_ends_it_or_does_not_count(
    run: ShortRun, evaluated: Evaluated, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run.data / "val", tmp_path / "val")
    broken = tmp_path / "val/n00000001/n00000001_2.JPEG"
    broken.write_bytes(broken.read_bytes()[:200])
    assert ssam_scale("evaluate", run.checkpoint, "--data", tmp_path / "val") == 2
    assert "n00000001_2.JPEG: " in capsys.readouterr().err
    found = evaluated(run.checkpoint, "--data", tmp_path / "val", "data.on_damaged=skip")
    logits, labels = logits_and_labels(run)
    kept = torch.arange(20) != 7
    assert found["damaged"] == ["n00000001/n00000001_2.JPEG"]
    assert found["images"] == 19
    assert found["top1"] == pytest.approx(top1(logits[kept], labels[kept]))
    assert found["loss"] == pytest.approx(float(F.cross_entropy(logits[kept], labels[kept])), rel=1e-6)


@pytest.mark.slow
def test_a_file_of_weights_with_its_configuration(run: ShortRun, evaluated: Evaluated, tmp_path: Path) -> None:
    shutil.copy(run.checkpoint / "model.safetensors", tmp_path / "weights.safetensors")
    expected = evaluated(run.checkpoint, "--no-ema")
    found = evaluated(tmp_path / "weights.safetensors", "--config", run.home / "run.yaml")
    assert (found["top1"], found["loss"], found["classes"]) == (
        expected["top1"],
        expected["loss"],
        expected["classes"],
    )


@pytest.mark.slow
@pytest.mark.parametrize("backend", few(["fsdp2", "zero3"], "fsdp2"))
def test_a_sharded_checkpoint_is_the_whole_one(
    backend: str, run: ShortRun, evaluated: Evaluated, tmp_path: Path
) -> None:
    config = write_config(tmp_path / "run.yaml", run.data, train={"epochs": 1, "ema_decay": 0.5})
    train_on_ranks(2, config, f"sharding.backend={backend}", "checkpoint.format=sharded")
    sharded = tmp_path / "checkpoints/epoch_0001"
    assert (sharded / "model.rank_00001.safetensors").exists()
    assert ssam_scale("consolidate", sharded, tmp_path / "whole") == 0
    found, expected = evaluated(sharded), evaluated(tmp_path / "whole/epoch_0001")
    assert {**found, "checkpoint": ""} == {**expected, "checkpoint": ""}
    recorded = json.loads((tmp_path / "checkpoints/result.json").read_text())
    assert found["top1"] == recorded["top1"]
    # The run's two processes had batches of other sizes: another order of summation in fp32.
    assert found["loss"] == pytest.approx(recorded["loss"], rel=1e-6)
    # And the optimizer's state need not have come along.
    for path in sharded.glob("optimizer.*"):
        path.unlink()
    assert {**evaluated(sharded), "checkpoint": ""} == {**expected, "checkpoint": ""}


MISUSES: dict[str, tuple[list[str], str]] = {
    "no checkpoint": (["{home}/data"], "data: is not a checkpoint, which has a state.json, and has none in it"),
    "a name near one": (
        ["{home}/checkpoints/epoch_0009"],
        "no such checkpoint; there is {home}/checkpoints/epoch_0003",
    ),
    "no run": (["nobody", "--tracking-uri", "{store}"], "run 'nobody': none of experiment 'ssam_scale'"),
    "no store": (
        ["nobody", "--tracking-uri", "sqlite:///{home}/none.db"],
        "nobody: no such checkpoint here, and no run",
    ),
    "no metric": (["{home}/checkpoints", "--best", "accuracy"], "--best accuracy: an evaluation has top1, top5, loss"),
    "a metric nobody has": (["{home}/checkpoints", "--best", "top5"], "none of the 3 checkpoints"),
    "a file": (["{home}/run.yaml"], "is a file; give a checkpoint's folder, or, of a file of weights, --config"),
    "other classes": (["{last}", "model.num_classes=5"], "fc.bias is (4,) there and (5,) here"),
    "another network": (["{last}", "model.name=resnet34"], "does not fit this run's resnet34"),
    "an unknown key": (["{last}", "data.eval_size=64"], "data.eval_size: unknown key"),
    "no data": (["{last}", "--data", "{home}/none"], "none: no such file"),
    "no images": (["{last}", "--data", "{home}/empty"], "empty/n00000000: a class folder without images"),
    "classes of others": (["{last}", "--data", "{home}/others"], "dog is not among the 4 classes"),
    "no labels": (["{last}", "--labels", "{home}/run.yaml"], "run.yaml: is no JSON"),
    "labels of others": (["{last}", "--labels", "{home}/labels.json"], "labels.json: has nothing on 0 and 19 others"),
    "a picture of nothing known": (["{last}", "--picture", "{home}/p.bmp"], "name it p.png, p.svg, p.pdf"),
    "a picture nowhere": (["{last}", "--picture", "{home}/none/p.png"], "there is no folder {home}/none"),
    "no weights of another size": (["{home}/w.pth", "--config", "{home}/run.yaml"], "holds more than tensors"),
    "a resolution": (["{last}", "data.eval_resolution=4"], "data.eval_resolution: must be"),
}


@pytest.mark.slow
@pytest.mark.parametrize("misuse", MISUSES)
def test_misuse_is_a_line(misuse: str, run: ShortRun, capsys: pytest.CaptureFixture[str]) -> None:
    names = {"home": run.home, "last": run.checkpoint, "store": run.store}
    (run.home / "empty/n00000000").mkdir(parents=True, exist_ok=True)
    (run.home / "others/dog").mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 40)).save(run.home / "others/dog/1.png")
    (run.home / "labels.json").write_text('{"1.png": [0]}')
    torch.save({"w": torch.zeros(1), "f": Path("x")}, run.home / "w.pth")
    arguments, said = MISUSES[misuse]
    assert ssam_scale("evaluate", *(argument.format(**names) for argument in arguments)) == 2
    error = capsys.readouterr().err
    assert said.format(**names) in error
    assert error.count("\n") == 1


@pytest.mark.slow
def test_a_checkpoint_that_does_not_name_its_classes(run: ShortRun, evaluated: Evaluated, tmp_path: Path) -> None:
    """As older ones do not: they are the training images', where these are still there."""
    path, some = tmp_path / "epoch_0003", tmp_path / "some"
    shutil.copytree(run.checkpoint, path)
    state = read_state(path)
    del state["classes"]
    (path / "state.json").write_text(state_text(state))
    shutil.copytree(run.data / "val/n00000002", some / "n00000002")
    shutil.copytree(run.data / "val/n00000001", some / "n00000001")
    expected = evaluated(run.checkpoint, "--data", some)
    assert {**evaluated(path, "--data", some), "checkpoint": ""} == {**expected, "checkpoint": ""}
    gone = [f"data.{key}={tmp_path}/gone.beton" for key in ("train", "val")]
    assert [each["name"] for each in evaluated(path, "--data", run.data / "val", *gone)["classes"]] == list("0123")
    assert ssam_scale("evaluate", path, "--data", some, *gone) == 2


@pytest.mark.slow
def test_it_is_the_work_of_one_process(
    run: ShortRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert ssam_scale("evaluate", run.checkpoint) == 2
    assert "this is the work of one process; start it without torchrun" in capsys.readouterr().err


@pytest.mark.slow
def test_damaged_weights_are_refused(run: ShortRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "epoch_0003"
    shutil.copytree(run.checkpoint, path)
    for name, said in (
        ("ema.safetensors", "ema.safetensors is damaged: its SHA-256"),
        ("state.json", "state.json is damaged"),
    ):
        raw = (path / name).read_bytes()
        (path / name).write_bytes(flipped(raw, 8 * len(raw) - 9))
        assert ssam_scale("evaluate", path) == 2
        assert said in capsys.readouterr().err
        (path / name).write_bytes(raw)


def test_the_calibration_error_of_known_confidences() -> None:
    # Half of the images at 0.9 are right, a fifth at 0.25: gaps of 0.4 and 0.05 (Guo et al., equation 3).
    confidence = np.array([0.9] * 10 + [0.25] * 10)
    right = np.array([True] * 5 + [False] * 5 + [True] * 2 + [False] * 8)
    assert calibration_error(confidence, right) == pytest.approx(100.0 * (0.4 + 0.05) / 2)
    # An image whose confidence is a bin's upper end is in it, and certainty in the last.
    assert calibration_error(np.array([1.0, 0.0]), np.array([True, False])) == 0.0
    assert calibration_error(np.array([1 / 15, 1.5 / 15]), np.array([True, False])) == pytest.approx(
        100.0 * (14 / 15 + 1.5 / 15) / 2
    )

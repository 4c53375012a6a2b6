"""The ImageNet configurations on a small folder in ImageNet's layout, through the real path."""

from __future__ import annotations

from pathlib import Path

import mlflow
import pytest

from tests.support.images import make_image_folder
from tests.support.runs import ssam_scale

CONFIGS = Path(__file__).parents[2] / "configs"
MODELS = {"resnet50": "resnet50", "vit_b": "vit_base_patch16_224", "convnext_t": "convnext_tiny"}
IMAGES, CLASSES = 64, 1000


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,000 class folders of JPEGs of 300-500 px, of which the files hold the first 64 of a random order.

    Sixteen pictures, each in many of the folders: what is in them does not matter here.
    """
    folder = tmp_path_factory.mktemp("imagenet")
    for split, seed in (("train", 0), ("val", 1)):
        pictures = make_image_folder(folder / f"{split} pictures", 16, 1, (300, 500), seed)
        for index in range(CLASSES):
            (folder / split / f"n{index:08}").mkdir(parents=True)
            (folder / split / f"n{index:08}" / "0.JPEG").hardlink_to(pictures[index % 16])
        assert (
            ssam_scale(
                "data",
                "write",
                folder / split,
                folder / f"{split}.beton",
                "--max-resolution",
                "500",
                "--limit",
                str(IMAGES),
            )
            == 0
        )
    return folder


def overrides(imagenet: Path, home: Path) -> list[str]:
    """What a small folder and a CPU need; all else is as in the file."""
    return [
        f"data.train={imagenet}/train.beton",
        f"data.val={imagenet}/val.beton",
        f"data.batch_size={IMAGES // 2}",
        f"checkpoint.directory={home}/checkpoints",
        f"tracking.uri=sqlite:///{home}/mlflow.db",
        "train.epochs=1",
        "train.precision=fp32",  # CPUs without bf16 instructions emulate it, slowly
        "schedule.warmup_epochs=0",
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "method", "smaller"),
    [
        # Pixels and Fisher samples are fewer; all else is as in the file.
        ("resnet50", "ssam-element", ["perturbation.mask.samples=8", "data.resolution=96", "data.eval_resolution=96"]),
        ("convnext_t", "ssam-depth", ["data.resolution=64", "data.eval_resolution=64"]),
        ("vit_b", "ssam-depth", ["data.resolution=64", "data.eval_resolution=64", "model.kwargs.img_size=64"]),
    ],
)
def test_it_dry_runs_and_trains_an_epoch(
    name: str, method: str, smaller: list[str], imagenet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", "--config", CONFIGS / f"{name}.yaml", *overrides(imagenet, tmp_path), *smaller]
    assert ssam_scale(*arguments, "--dry-run") == 0
    assert "an epoch has 2 steps" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    assert ssam_scale(*arguments) == 0
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("imagenet").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.tags["method"] == method
    assert run.data.metrics["epoch"] == 1
    assert run.data.params["model.num_classes"] == str(CLASSES)
    assert (tmp_path / "checkpoints/epoch_0001/model.safetensors").is_file()


@pytest.mark.parametrize("name", ["resnet50", "vit_b", "convnext_t", "quickstart"])
def test_the_file_is_valid(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = CONFIGS / f"{name}.yaml"
    assert ssam_scale("train", "--config", path, "--print-config") == 0
    assert f"name: {'resnet18' if name == 'quickstart' else MODELS[name]}" in capsys.readouterr().out

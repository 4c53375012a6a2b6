"""The ImageNet configurations on a small folder in ImageNet's layout, through the real path."""

from __future__ import annotations

from pathlib import Path

import mlflow
import pytest
import torch

from ssam_scale.config.load import load
from ssam_scale.config.micro_batches import micro_batches
from ssam_scale.config.schema import Config
from ssam_scale.costs.cluster import Cluster
from ssam_scale.costs.estimate import Activations, footprint
from ssam_scale.costs.workload import weights_of
from ssam_scale.models import build_model
from ssam_scale.train.optimizer import base_optimizer
from ssam_scale.train.predict_cost import (
    ascents_of,
    configured_sam,
    placement_of,
    plans_of,
    staged_model,
    state_bytes_per_weight,
)
from tests.support.images import make_image_folder
from tests.support.runs import launch, ssam_scale
from tests.support.tiers import few

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
        "tracking.log_model=false",  # which takes longer than the epoch
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
        # Which the line below trains, with fewer blocks.
        pytest.param(
            "vit_b",
            "ssam-depth",
            ["data.resolution=64", "data.eval_resolution=64", "model.kwargs.img_size=64"],
            marks=pytest.mark.exhaustive,
        ),
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


@pytest.mark.slow
@pytest.mark.parametrize("launcher", few(["deepspeed", "torchrun"], "deepspeed"))
def test_the_line_that_runs_vit_b_on_zero(launcher: str, imagenet: Path, tmp_path: Path) -> None:
    """`deepspeed launch/train.py --config configs/vit_b.yaml`, with a narrower network."""
    narrow = ["data.resolution=64", "data.eval_resolution=64", "model.kwargs.img_size=64", "model.kwargs.depth=3"]
    narrow += ["model.kwargs.embed_dim=96", "model.kwargs.num_heads=3"]
    said = launch(launcher, 2, CONFIGS / "vit_b.yaml", *overrides(imagenet, tmp_path), *narrow)
    lines = [line for line in said.splitlines() if "vit_base_patch16_224" in line and "on 2 processes" in line]
    assert len(lines) == 1
    assert "ssam-depth vit_base_patch16_224 on 2 processes of 1 node, ZeRO stage 2, CPU, fp32" in lines[0]
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("imagenet").experiment_id])
    assert (run.info.status, run.data.tags["backend"]) == ("FINISHED", "zero2")


# MB that a forward in bf16 keeps of an image of 224 pixels for the backward.
KEPT = {"resnet50": 44, "vit_b": 66, "convnext_t": 61}
CARD, USABLE = 40e9, 0.9


def kept_of_an_image(config: Config) -> float:
    """Bytes that a forward in float32 keeps of an image: counted on a device without memory."""
    with torch.device("meta"):
        model = build_model(config).train()
        images = [torch.empty(n, 3, 224, 224) for n in (8, 16)]
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}

    def kept(batch: torch.Tensor) -> int:
        found: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            found[tensor.untyped_storage()._cdata] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = model(batch)
        del output
        return sum(t.untyped_storage().nbytes() for storage, t in found.items() if storage not in own)

    few, many = map(kept, images)
    return (many - few) / 8


@pytest.mark.slow
@pytest.mark.parametrize("name", KEPT)
def test_a_step_fits_on_cards_of_40_gb(name: str) -> None:
    """The arithmetic in the files' comments, on one GPU, on the default Slurm line's 4, and on many nodes.

    Of the activations a quarter more than the base step's, which is what dense SAM's peak has over it on a CPU.
    """
    config = load(CONFIGS / f"{name}.yaml")
    # Half of what float32 takes but for what autocast keeps in float32 (norms, losses) and what it saves twice.
    assert kept_of_an_image(config) / 2 == pytest.approx(1e6 * KEPT[name], rel=0.15)
    network = staged_model(config)
    base = base_optimizer(config, network.model)
    weights, state = weights_of(network, base), state_bytes_per_weight(config)
    numel = sum(w.numel for w in weights.values())
    dense = config.model_copy(update={"perturbation": config.perturbation.model_copy(update={"mask": None})})
    opt = configured_sam(dense, network, base)
    for gpus in (1, 4, 8, 64):
        split = micro_batches(config, gpus)
        assert split.batch == config.data.batch_size
        ascents = ascents_of(dense, network, opt, plans_of(dense, opt), split.accumulation)
        placement = placement_of(config, Cluster(gpus, 8, 1.0, 1.0))
        kept = Activations(0.0, 1.25e6 * KEPT[name])
        held = footprint(weights, ascents, placement, state, kept, split.images, split.accumulation).total
        averages = 4 * numel if config.train.ema_decay is not None else 0
        low_precision = 2 * numel  # of the weights, in autocast's cache
        # Of a whole step and the next one; of that also as they were before they were mixed.
        images = (3 if config.loss.mixup else 2) * config.data.batch_size // gpus * 3 * 224 * 224 * 4
        assert held + averages + low_precision + images < USABLE * CARD, (name, gpus)


@pytest.mark.parametrize("name", ["resnet50", "vit_b", "convnext_t", "quickstart"])
def test_the_file_is_valid(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = CONFIGS / f"{name}.yaml"
    assert ssam_scale("train", "--config", path, "--print-config") == 0
    assert f"name: {'resnet18' if name == 'quickstart' else MODELS[name]}" in capsys.readouterr().out

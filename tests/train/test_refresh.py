"""Every mask that a configuration can name, in short runs: what it perturbs, when it is chosen, what is recorded."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from ssam_scale.config.schema import Config
from ssam_scale.masks import BitMask
from ssam_scale.train.length import Length
from ssam_scale.train.refresh import fewest_samples
from tests.support.runs import RESNET, VIT, ssam_scale, train_on_ranks, write_config
from tests.support.tracked import STEPS, artifact, history, saved, table, train


def shapes(home: Path) -> dict[str, torch.Size]:
    whole = load_file(home / "checkpoints/epoch_0002/model.safetensors")
    return {name: t.shape for name, t in whole.items() if "running" not in name and "num_batches" not in name}


def bits(home: Path) -> dict[str, Tensor]:
    """The saved choice of single weights, as booleans."""
    flags = saved(home)
    return {n: BitMask(flags[f"mask.{n}"], s.numel()).booleans().view(s) for n, s in shapes(home).items()}


def test_two_of_four(home: Path, data: Path) -> None:
    run = train(home, data, {"pattern": "nm", "samples": 8, "indivisible": "unperturbed"})
    assert run.data.tags["method"] == "ssam-nm"
    for name, chosen in bits(home).items():
        if name == "conv1.weight":  # three colours
            assert not chosen.any()
        elif chosen.ndim == 1:
            assert chosen.all()
        else:
            rest = chosen.shape[2:]
            assert (chosen.view(chosen.shape[0], -1, 4, *rest).sum(2) == 2).all(), name
    assert history(home, run, "mask/samples") == {0: 8, STEPS: 8}
    assert 0.0 < run.data.metrics["perturbation/kappa"] < 1.0  # by the first step, which looks at the whole gradient


@pytest.mark.slow
def test_rows_by_steps(home: Path, data: Path) -> None:
    run = train(home, data, {"pattern": "row", "score": "weight", "allocation": "uniform", "refresh_steps": 3})
    flags, steps = saved(home), {0: None, 3: None, 6: None}
    for name, shape in shapes(home).items():
        kept = flags[f"mask.{name}"]
        assert kept.shape == shape[:1]
        assert int(kept.sum()) == len(kept) // 2, name
    assert int(flags["chosen_at"]) == 6
    assert history(home, run, "time/refresh").keys() == steps.keys()
    assert "mask/samples" not in run.data.metrics
    assert history(home, run, "mask/turnover").keys() == {3, 6}
    # Weights move little in three steps.
    assert 0.0 <= run.data.metrics["mask/turnover"] < 0.2


def test_of_refreshes_in_each_step_one_is_recorded_as_often_as_all_else(home: Path, data: Path) -> None:
    run = train(home, data, {"pattern": "tensor", "score": "random", "refresh_steps": 1})
    assert history(home, run, "time/refresh").keys() == {0, 2, 4, 6}  # tracking.log_every is 2
    steps, densities = table(home, run)
    assert steps == [0, 2, 4, 6]
    assert len(set(zip(*densities.values(), strict=True))) == 4, "each time others"
    assert int(saved(home)["chosen_at"]) == 7


def test_blocks_chosen_once(home: Path, data: Path) -> None:
    run = train(home, data, {"pattern": "block", "samples": 8, "sparsity": 0.8, "refresh_epochs": None})
    steps, densities = table(home, run)
    assert steps == [0]
    whole = {name.rpartition(".")[0].rpartition(".")[0]: x for name, [x] in densities.items() if "layer" in name}
    assert set(whole.values()) == {0.0, 1.0}
    assert run.data.metrics["summary/density"] <= 0.2
    assert "mask/turnover" not in run.data.metrics


def test_normalization_layers(home: Path, data: Path) -> None:
    run = train(home, data, {"pattern": "norm"})
    steps, densities = table(home, run)
    assert steps == [0]
    assert {name for name, [density] in densities.items() if density} == {
        n for n in densities if "bn" in n or "ple.1" in n
    }
    kinds = {key.partition(".")[0] for key in saved(home)}
    assert kinds == {"steps", "kept_as", "skipped", "kappa", "calibrated", "shares", "chosen_at"}


def test_named_parameters(home: Path, data: Path) -> None:
    run = train(home, data, {"pattern": "named", "parameters": ["^fc", r"layer4\..*conv"]})
    densities = table(home, run)[1]
    chosen = {name for name, [density] in densities.items() if density == 1.0}
    assert chosen == {n for n in densities if n.startswith("fc") or (n.startswith("layer4") and "conv" in n)}


def test_a_mask_that_drifts_and_refreshes_that_come_late_in_an_epoch(
    home: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(home, data, {"pattern": "element", "dynamic": {}, "samples": 20, "refresh_steps": 3})
    said = " ".join(capsys.readouterr().out.split())
    assert "a refresh near the end of an epoch scores what is left of it, 12 images at the least" in said
    total = sum(s.numel() for s in shapes(home).values())
    assert sum(int(b.sum()) for b in bits(home).values()) == total // 2
    assert history(home, run, "mask/turnover") == {
        # A quarter of the run is done at step 2, and d(1 + cos) / 2 of what was live makes way.
        step: pytest.approx(0.25 * (1 + math.cos(math.pi * step / 8)), abs=1e-3)
        for step in (3, 6)
    }
    # None for the random first choice; one batch of 12 is left at step 3, and two at step 6.
    assert history(home, run, "mask/samples") == {3: 12, 6: 20}
    assert run.data.tags["method"] == "ssam-dynamic"
    assert all(0.0 < kappa < 1.0 for kappa in history(home, run, "perturbation/kappa").values())


@pytest.mark.slow
def test_accumulated_scores_and_a_sparsity_that_is_annealed(home: Path, data: Path) -> None:
    mask = {"pattern": "element", "score": "accumulated", "sparsity": 0.2, "sparsity_final": 0.9, "refresh_steps": 2}
    run = train(home, data, mask)
    total = sum(s.numel() for s in shapes(home).values())
    wanted = {step: 0.9 - 0.7 * (1 + math.cos(math.pi * step / 8)) / 2 for step in (0, 2, 4, 6)}
    steps, densities = table(home, run)
    assert steps == list(wanted)
    for column, sparsity in enumerate(wanted.values()):
        perturbed = sum(densities[n][column] * s.numel() for n, s in shapes(home).items())
        assert perturbed == pytest.approx(int(total * (1 - sparsity)), rel=1e-3)
    kept = saved(home)
    scores = torch.cat([kept[f"accumulated.{n}"].flatten() for n in shapes(home)])
    assert scores.min() >= 0 < scores.max()


def test_layers_of_a_moving_cut_are_means_over_epochs(home: Path, data: Path) -> None:
    run = train(home, data, {"pattern": "depth"}, epochs=3)
    steps, densities = table(home, run)
    assert steps == [4, 8, 12]
    first, last = densities["conv1.weight"], densities["fc.weight"]
    assert last == [1.0, 1.0, 1.0]
    assert all(0.0 <= x < 1.0 and x % 0.25 == 0.0 for x in first)  # of 4 steps
    assert list(densities) == list(shapes_of_run(home))
    with Image.open(artifact(home, run, "density.png")) as picture:
        assert min(picture.size) > 300
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 20
    assert "perturbation/kappa" not in run.data.metrics  # its ascent sees the suffix alone


def shapes_of_run(home: Path) -> list[str]:
    import timm

    model = timm.create_model("resnet18", num_classes=4, **RESNET["kwargs"])
    return [name for name, _ in model.named_parameters()]


# ---- when there are fewer samples left


@pytest.mark.parametrize(
    ("mask", "fewest"),
    [
        ({"pattern": "row", "samples": 40}, None),  # each epoch begins with all of its images
        ({"pattern": "row", "samples": 40, "refresh_steps": 4}, None),
        ({"pattern": "row", "samples": 40, "refresh_steps": 2}, 24),
        ({"pattern": "row", "samples": 40, "refresh_steps": 3}, 12),  # at step 3
        ({"pattern": "row", "samples": 24, "refresh_steps": 2}, None),
        ({"pattern": "row", "score": "weight", "refresh_steps": 3}, None),
        ({"pattern": "depth"}, None),
        (None, None),
    ],
)
def test_how_few_samples_a_refresh_may_find(mask: dict[str, Any] | None, fewest: int | None) -> None:
    config = Config.model_validate(
        {
            "model": {"name": "resnet18"},
            "data": {"train": "t.beton", "val": "v.beton", "batch_size": 12},
            "optimizer": {"lr": 0.1},
            "perturbation": {"rho": 0.1, "mask": mask},
            "train": {"epochs": 2},
        }
    )
    assert fewest_samples(config, Length.of_epochs(2, 48, 12), 48) == fewest


# ---- on several processes


@pytest.mark.slow
def test_one_process_ddp_and_fsdp2_choose_the_same_weights(home: Path, data: Path) -> None:
    config = write_config(
        home / "run.yaml",
        data,
        model=VIT,
        perturbation={
            "rho": 0.05,
            "mask": {"pattern": "element", "dynamic": {"grow": "fisher"}, "samples": 17, "refresh_steps": 2},
        },
        train={"epochs": 1},
    )
    assert ssam_scale("train", "--config", config, f"checkpoint.directory={home}/single") == 0
    one = load_file(home / "single/epoch_0001/sparse.safetensors")
    assert int(one["chosen_at"]) == 2
    for backend in ("ddp", "fsdp2"):
        train_on_ranks(2, config, f"checkpoint.directory={home}/{backend}", f"sharding.backend={backend}")
        other = load_file(home / backend / "epoch_0001/sparse.safetensors")
        assert other.keys() == one.keys()
        masks = [name for name in one if name.startswith("mask.")]
        assert masks
        assert [name for name in masks if not torch.equal(one[name], other[name])] == []

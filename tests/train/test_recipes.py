"""The recipes of others: their files are valid, a step of each is taken, and groups decay what their sources do."""

from __future__ import annotations

from pathlib import Path

import pytest

from ssam_scale.config.load import load
from ssam_scale.models import build_model
from ssam_scale.train.optimizer import base_optimizer, check_groups
from tests.support.checkout import ROOT
from tests.support.runs import ssam_scale
from tests.support.tiers import few

RECIPES = {path.stem: path for path in sorted((ROOT / "configs" / "recipes").glob("*.yaml"))}


@pytest.mark.parametrize("name", RECIPES)
def test_every_key_is_known_and_a_method_goes_with_it(name: str) -> None:
    assert load(RECIPES[name], []).method == "base"
    assert load(RECIPES[name], ["perturbation={preset: sam}"]).method == "sam"
    assert load(RECIPES[name], ["perturbation={rho: 0.1, mask: {pattern: depth}}"]).method == "ssam-depth"


@pytest.mark.slow
def test_ffcvs_decay_is_of_all_but_what_has_bn_in_its_name() -> None:
    config = load(RECIPES["rn50_ffcv_16"], [])
    network = build_model(config).model
    check_groups(config, network)
    decay = {
        id(p): group["weight_decay"] for group in base_optimizer(config, network).param_groups for p in group["params"]
    }
    for name, p in network.named_parameters():
        assert decay[id(p)] == (0.0 if "bn" in name else 1e-4), name


@pytest.mark.slow
@pytest.mark.parametrize("name", few(RECIPES, "rn50_ffcv_16", "deit3_s"))
def test_a_step_is_taken_of_it(name: str, data: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With fewer images and pixels; all else is as in the file."""
    smaller = [
        f"data.train={data}/train.beton",
        f"data.val={data}/val.beton",
        "data.batch_size=8",
        "data.resolution=64",
        "data.eval_resolution=64",
        f"checkpoint.directory={home}/checkpoints",
        f"tracking.uri=sqlite:///{home}/mlflow.db",
        "train.precision=fp32",  # CPUs without bf16 instructions emulate it, slowly
        "train.max_micro_batch=null",
    ]
    if name.startswith("deit"):
        smaller.append("model.kwargs={img_size: 64}")
    if name.startswith("rn50"):
        smaller.append("data.progressive.resolution=32")
    assert ssam_scale("train", "--config", RECIPES[name], *smaller, "--dry-run") == 0
    assert "dry run: base" in capsys.readouterr().out

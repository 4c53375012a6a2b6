"""What the page of a run has beside its curves: data, network, machines, processes, and what they send."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ssam_scale.config.load import load
from ssam_scale.costs.compute import PassTimes, StageTimes, StepTimes
from ssam_scale.costs.estimate import Activations
from ssam_scale.costs.profile import Measured
from ssam_scale.models.torchvision_ops import ensure_torchvision
from ssam_scale.train import checkpoint
from tests.support.runs import VIT, ssam_scale, train_on_ranks, write_config
from tests.support.tracked import client


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="module")
def run(home: Path, data: Path) -> Any:
    """Of two processes, which average their weights and store the network."""
    stages = (StageTimes(1.0, 2.0, 1.0, 1.0),) * 4
    found = Measured(
        model=VIT["name"],
        resolution=32,
        precision="fp32",
        weights=57764,
        hardware="any",
        times=StepTimes((PassTimes(6, stages),), optimizer=0.0, perturb=0.0, images=6),
        activations=Activations(0.0, 0.0),
    )
    found.save(home / "times.json")
    config = write_config(
        home / "run.yaml",
        data,
        model=VIT,
        perturbation={"rho": 0.05},
        train={"epochs": 1, "ema_decay": 0.5},
        tracking={"log_model": True, "cost_times": str(home / "times.json")},
    )
    train_on_ranks(2, config)
    (found,) = client(home).search_runs(["1"])
    return found


pytestmark = pytest.mark.slow


def test_the_data_are_known_by_their_content(run: Any, data: Path) -> None:
    logged = {each.tags[0].value: each.dataset for each in run.inputs.dataset_inputs}
    for context, name in (("training", "train.beton"), ("validation", "val.beton")):
        assert logged[context].name == name
        assert logged[context].digest == hashlib.sha256((data / name).read_bytes()).hexdigest()[:32]
        assert f'"uri": "{data / name}"' in logged[context].source


def test_the_network_is_loaded_from_mlflow(run: Any, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The averaged weights, on batches of any size, without unpickling anything."""
    ensure_torchvision()
    import mlflow.pytorch

    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{home}/mlflow.db")
    loaded = mlflow.pytorch.load_model(f"runs:/{run.info.run_id}/model")
    expected = checkpoint.network_of(home / "checkpoints/epoch_0001", load(home / "run.yaml", []))
    weights = load_file(home / "checkpoints/epoch_0001/model.safetensors")
    assert any(not torch.equal(tensor, weights[name]) for name, tensor in expected.state_dict().items())
    images = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), expected.eval()(images), rtol=0, atol=1e-6)


def test_the_cost_model_stands_beside_the_probes(run: Any) -> None:
    """Dense SAM, whose step was measured to be passes alone, and which sends nothing that takes time."""
    assert run.data.metrics["overhead/predicted_percent"] == pytest.approx(100.0, abs=0.01)
    assert run.data.metrics["saving/predicted_percent"] == pytest.approx(0.0, abs=0.01)


def test_times_of_another_network_are_refused_at_once(run: Any, home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    another = [f"checkpoint.directory={home}/other", "data.resolution=40", "model.kwargs.img_size=40"]
    assert ssam_scale("train", "--config", home / "run.yaml", *another) == 2
    said = "resolution is 32 there and 40 in the configuration"
    assert f"tracking.cost_times {home}/times.json: {said}" in capfd.readouterr().err


def test_processes_are_compared_and_what_they_send_is_counted(run: Any, home: Path) -> None:
    metrics = run.data.metrics
    for phase in ("data", "ascent_forward", "descent_backward", "optimizer"):
        low, mean, high = (metrics[f"ranks/{phase}/{which}"] for which in ("min", "mean", "max"))
        assert 0.0 < low <= mean <= high
    assert metrics["ranks/slowest"] in (0.0, 1.0)
    assert metrics["memory/peak_gib"] > 0.0
    weights = sum(tensor.numel() for tensor in load_file(home / "checkpoints/epoch_0001/model.safetensors").values())
    # All of the weights in each of two passes, of which one of two processes sends 2 · ½.
    assert metrics["comm/dense/all_reduce_mib"] == pytest.approx(2 * 4 * weights / 2**20, rel=0.01)
    assert not [name for name in metrics if name.startswith("energy/")]  # of GPUs alone

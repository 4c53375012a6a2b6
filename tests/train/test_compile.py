"""`train.compile`: whole runs on a compiled network, and what is said where nothing can be compiled."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from tests.support.runs import VIT, differing, ssam_scale, tensors_of, train_on_ranks, write_config

RUN = {
    "model": VIT,
    "perturbation": {"rho": 0.05, "mask": {"pattern": "depth"}},
    "train": {"epochs": 2, "ema_decay": 0.9},
}
# Fused kernels round elsewhere than the operators one by one, like another order of summation, in each of eight steps.
TOLERANCE = 1e-5


@pytest.mark.slow
def test_a_run_is_the_same_within_rounding_and_is_resumed_bit_for_bit(
    data: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(home / "run.yaml", data, **RUN)
    assert ssam_scale("train", "--config", config, f"checkpoint.directory={home}/plain") == 0
    torch.compiler.reset()  # what other tests have compiled is not compiled again
    counters.clear()
    assert ssam_scale("train", "--config", config, "train.compile=true") == 0
    assert counters["stats"]["unique_graphs"] > 4
    assert "CPU, fp32, compiled\n" in capsys.readouterr().out
    last = home / "checkpoints/epoch_0002"
    assert differing(home / "plain/epoch_0002", last, TOLERANCE) == []
    assert not [name for name in tensors_of(last) if "_orig_mod" in name]
    shutil.move(last, home / "uninterrupted")
    assert ssam_scale("train", "--config", config, "train.compile=true", "--resume", "auto") == 0
    assert differing(home / "uninterrupted", last) == []


@pytest.mark.exhaustive  # compiled steps on ranks are in tests/sharding/test_compile.py
def test_two_processes_on_fsdp2(data: Path, home: Path) -> None:
    config = write_config(home / "run.yaml", data, **RUN)
    for compiled in ("false", "true"):
        overrides = ["sharding.backend=fsdp2", f"train.compile={compiled}", f"checkpoint.directory={home}/{compiled}"]
        train_on_ranks(2, config, *overrides)
    assert differing(home / "false/epoch_0002", home / "true/epoch_0002", TOLERANCE) == []


@pytest.fixture
def no_compiler() -> Iterator[None]:
    """A machine without a C++ compiler; whatever was compiled before is still on disk."""
    import torch._inductor.config

    # Not monkeypatch, which takes the configuration for a class and ends by deleting the entry.
    with torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        yield


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_it_is_said_before_anything_is_built(
    data: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(home / "run.yaml", data, **RUN)
    there = sorted(home.rglob("*"))
    for command in (["train"], ["train", "--dry-run"], ["cost"]):
        assert ssam_scale(*command, "--config", config, "train.compile=true") == 2
        err = capsys.readouterr().err
        assert err.startswith("ssam-scale: error: train.compile=true: torch.compile makes no code for cpu here (")
        assert err.endswith("); it needs a C++ compiler (g++, or what CXX names) and Python's headers\n")
        assert err.count("\n") == 1
    assert ssam_scale("bench", "steps", "--compile", "--models", "test_vit") == 2
    assert capsys.readouterr().err.startswith("ssam-scale: error: --compile: torch.compile makes no code for cpu here")
    assert sorted(home.rglob("*")) == there
    assert ssam_scale("train", "--config", config, "--dry-run") == 0  # which compiles nothing


@pytest.mark.exhaustive
def test_costs_and_benchmarks_measure_the_compiled_network(
    data: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, times = write_config(home / "run.yaml", data, **RUN), home / "times.json"
    torch.compiler.reset()  # what other tests have compiled is not compiled again
    counters.clear()
    given = ["--config", config, "--repeats", "1", "--images", "4", "train.compile=true"]
    assert ssam_scale("cost", *given, "--save-times", times) == 0
    assert counters["stats"]["unique_graphs"] > 4
    assert json.loads(times.read_text())["compile"] is True
    assert ssam_scale("cost", "--config", config, "--times", times) == 2
    assert "compile is True there and False in the configuration" in capsys.readouterr().err
    before = counters["stats"]["unique_graphs"]
    small = [
        "--models",
        "test_vit",
        "--resolution",
        "32",
        "--batch-size",
        "4",
        "--repeats",
        "1",
        "--plans",
        "moving cut",
    ]
    assert ssam_scale("bench", "steps", "--compile", *small, "--json") == 0
    assert counters["stats"]["unique_graphs"] > before
    rows = json.loads(capsys.readouterr().out)
    assert [row["plan"] for row in rows] == ["base", "moving cut"]
    assert all(row["compile"] is True for row in rows)

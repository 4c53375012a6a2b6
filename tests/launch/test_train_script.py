"""launch/train.py takes what `ssam-scale train` takes and what launchers add."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.support.checkout import ROOT
from tests.support.processes import run

SCRIPT = ROOT / "launch" / "train.py"
QUICKSTART = ROOT / "configs" / "quickstart.yaml"


def test_launchers_arguments_are_dropped(tmp_path: Path):
    plain = run([sys.executable, SCRIPT, "--config", QUICKSTART, "--print-config", "train.seed=7"], cwd=tmp_path)
    assert plain.returncode == 0, plain.stdout
    assert "seed: 7" in plain.stdout
    for rank in (["--local_rank=1"], ["--local_rank", "1"], ["--local-rank=1"]):
        same = run(
            [sys.executable, SCRIPT, *rank, "--config", QUICKSTART, "--print-config", "train.seed=7"], cwd=tmp_path
        )
        assert (same.returncode, same.stdout) == (0, plain.stdout)


def test_deepspeeds_configuration_file_chooses_the_stage(tmp_path: Path):
    (tmp_path / "zero.json").write_text('{"zero_optimization": {"stage": 2, "reduce_bucket_size": 5e8}}')
    arguments = ["--deepspeed", "--deepspeed_config=zero.json", "--config", QUICKSTART, "--print-config"]
    done = run([sys.executable, SCRIPT, *arguments], cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert "backend: zero2" in done.stdout
    assert "reduce_bucket_size: 500000000.0" in done.stdout


def test_deepspeed_says_what_the_configuration_says(tmp_path: Path):
    arguments = ["--local_rank=0", "--deepspeed", "--config", ROOT / "configs/vit_b.yaml", "--print-config"]
    done = run([sys.executable, SCRIPT, *arguments], cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert "backend: zero2" in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--deepspeed"], "--deepspeed: sharding.backend is auto; say which stage of ZeRO: sharding.backend=zero2, or"),
        (["--deepspeed_config=none.json"], "--deepspeed_config none.json: no such file"),
        (["--deepspeed_config=list.json"], "list.json: a configuration of DeepSpeed's is an object with keys"),
        (["--deepspeed-config=clip.json"], "clip.json:1: gradient_clipping: 1.0 contradicts optimizer.clip_grad_norm"),
    ],
)
def test_a_mistake_with_deepspeed_is_one_line(options: list[str], message: str, tmp_path: Path):
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "clip.json").write_text('{"gradient_clipping": 1.0, "zero_optimization": {"stage": 1}}')
    done = run([sys.executable, SCRIPT, *options, "--config", QUICKSTART], cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout.count("\n") == 1
    assert done.stdout.startswith(f"ssam-scale: error: {message}")


def test_a_mistake_is_one_line_and_exit_code_2(tmp_path: Path):
    done = run([sys.executable, SCRIPT, "--config", QUICKSTART, "train.epoch=7"], cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout.splitlines() == [
        "ssam-scale: error: override train.epoch=7: train.epoch: unknown key; did you mean train.epochs?"
    ]

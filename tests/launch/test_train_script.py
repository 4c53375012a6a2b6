"""launch/train.py takes what `ssam-scale train` takes and what launchers add."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.support.processes import run

from .conftest import ROOT

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


def test_zero_is_refused_in_one_line(tmp_path: Path):
    for option in ("--deepspeed", "--deepspeed_config=zero.json"):
        done = run([sys.executable, SCRIPT, option, "--config", QUICKSTART], cwd=tmp_path)
        assert done.returncode == 2
        assert done.stdout.count("\n") == 1
        assert done.stdout.startswith(f"train.py: error: {option.partition('=')[0]}: ")


def test_a_mistake_is_one_line_and_exit_code_2(tmp_path: Path):
    done = run([sys.executable, SCRIPT, "--config", QUICKSTART, "train.epoch=7"], cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout.splitlines() == [
        "ssam-scale: error: override train.epoch=7: train.epoch: unknown key; did you mean train.epochs?"
    ]

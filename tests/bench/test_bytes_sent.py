"""`ssam-scale bench bytes`, run as its users run it."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch

from ssam_scale.bench.networks import Setting
from ssam_scale.cli.main import main
from ssam_scale.costs.collectives import ring_bytes

SETTING = Setting("test_vit", 32, 2, torch.device("cpu"))


@pytest.mark.slow
def test_the_bytes_of_plans_and_backends() -> None:
    wanted = ["cut 0.5", "norm", "interval 2", "element 50%"]
    line = [sys.executable, "-m", "ssam_scale", "bench", "bytes", "--models", "test_vit", "--json"]
    line += [part for name in wanted for part in ("--plans", name)]
    line += [part for name in ("ddp", "fsdp2", "hsdp") for part in ("--backends", name)]
    result = subprocess.run(line, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    rows = {(row["backend"], row["plan"]): row for row in json.loads(result.stdout)}
    network = SETTING.network()
    whole = 4 * sum(p.numel() for p in network.parameters())
    for (backend, plan), row in rows.items():
        assert row["ranks"] == (4 if backend == "hsdp" else 2)
        assert row["step_bytes"] == pytest.approx(sum(row["step_bytes_by_collective"].values()))
        assert row["ascent_bytes"] == pytest.approx(row["step_bytes"] - rows[backend, "base"]["step_bytes"])
        over = row["ascent_bytes"] / rows[backend, "sam"]["ascent_bytes"]
        assert row["ascent_bytes_over_dense"] == pytest.approx(over)
        assert math.isfinite(over)
        assert (over == 0.0) == (plan == "base")
    # The base step reduces every gradient once, dense SAM twice; nothing else is sent but a few numbers.
    for plan, times in (("base", 1.0), ("sam", 2.0)):
        assert rows["ddp", plan]["step_bytes"] == pytest.approx(times * ring_bytes("all_reduce", whole, 2), rel=1e-3)
        reduced = rows["fsdp2", plan]["step_bytes_by_collective"]["reduce_scatter"]
        assert reduced == pytest.approx(times * ring_bytes("reduce_scatter", whole, 2), rel=0.01)
        between = rows["hsdp", plan]["step_bytes_by_collective"]["all_reduce"]
        assert between == pytest.approx(times * ring_bytes("all_reduce", whole / 2, 2), rel=0.01)
    for plan in ("cut 0.5", "norm", "interval 2"):
        row = rows["ddp", plan]
        assert row["ascent_bytes_over_dense"] <= row["density"] + 0.01
        assert rows["fsdp2", plan]["ascent_bytes_over_dense"] < 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "1"], "--ranks is 1; at least 2 are needed"),
        (["--backends", "fsdp"], "there is no backend 'fsdp'; there are ddp, fsdp2, hsdp, zero0"),
        (["--plans", "textbook"], "there is no plan 'textbook'; there are 'base', 'sam'"),
        (["--models", "test_efficientnet"], "EfficientNet has no stages"),
    ],
)
def test_mistakes_are_the_users_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", "bytes", *arguments])
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.err.count("\n") == 1

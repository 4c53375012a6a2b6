"""`ssam-scale bench memory`, run as its users run it, on a small network."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ssam_scale.bench.networks import setting_of
from ssam_scale.bench.peak_memory import has_one_peak
from ssam_scale.bench.scenarios import scenarios

SMALL = ["--models", "test_vit", "--resolution", "32", "--batch-size", "4", "--repeats", "1"]


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ssam_scale", "bench", "memory", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def check(measured: list[dict[str, Any]], expected: list[str]) -> None:
    rows = {row["plan"]: row for row in measured}
    assert list(rows) == expected
    parameters = list(setting_of("test_vit", 32, 4).network().parameters())
    weights, slices = sum(p.numel() for p in parameters), sum(len(p) for p in parameters)
    for name, row in rows.items():
        # Weights and momentum in float32, four images and labels; a bit a weight for masks of single weights; a flag a
        # row for masks of rows, and the indices of those that are kept; memory to back up what our plans perturb.
        mask = weights / 8 if name == "element 50%" else 0.0
        more = 9 * slices if name.startswith("row") else 0
        batch = 4 * (3 * 32 * 32 * 4 + 8)
        backup = 4 * weights * row["density"] if name not in ("base", "textbook", "pytorch_optimizer") else 0.0
        assert row["persistent_bytes"] == pytest.approx(8 * weights + batch + mask + backup, abs=200 + more)
        assert row["model"] == "test_vit"
        if row["peak_bytes"] is None:  # this system does not tell
            continue
        assert row["peak_bytes"] == row["persistent_bytes"] + row["step_bytes"]
        assert row["peak_over_base"] == row["peak_bytes"] / rows["base"]["peak_bytes"]
        assert row["step_bytes"] > 4 * weights * 0.5  # at least the gradients, but for pages that were there before
    assert rows["base"]["density"] == 0.0
    assert rows["base"]["peak_over_base"] in (1.0, None)


@pytest.mark.slow
def test_rows_add_up_and_make_a_table(tmp_path: Path) -> None:
    """A plan of each kind; one that moves has no one peak and is left out."""
    plans = ["element 50%", "cut 0.5"]
    options = [*(word for plan in [*plans, "moving cut"] for word in ("--plans", plan)), "--record", str(tmp_path)]
    result = bench(*SMALL, *options)
    assert result.returncode == 0, result.stderr
    assert "peak / base" in result.stdout
    [raw] = tmp_path.glob("peak-memory_*.json")
    check(json.loads(raw.read_text())["rows"], [s.name for s in scenarios() if s.name in ["base", *plans]])


@pytest.mark.exhaustive  # a process for each of some thirty plans
def test_every_plan_has_its_row() -> None:
    result = bench(*SMALL, "--json")
    assert result.returncode == 0, result.stderr
    check(json.loads(result.stdout), [scenario.name for scenario in scenarios() if has_one_peak(scenario)])

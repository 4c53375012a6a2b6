"""launch/gpu_report.sh on a machine without a GPU, and with a pretended one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.checkout import ROOT
from tests.support.processes import run

SCRIPT = ROOT / "launch" / "gpu_report.sh"
TABLES = {"step-time", "peak-memory", "throughput"}


def report(*arguments: str | Path, python: str | Path = sys.executable, **env: str) -> subprocess.CompletedProcess[str]:
    return run(["bash", SCRIPT, *arguments], cwd=ROOT, env={"PYTHON": str(python), **env})


@pytest.fixture
def pretending(tmp_path: Path) -> Path:
    """A Python that pretends to have one GPU, as do all processes that it starts."""
    python = tmp_path / "python"
    path = f"{ROOT}:{ROOT / 'tests' / 'support' / 'pretended_gpu' / 'in_every_process'}"
    python.write_text(f'#!/bin/bash\nPYTHONPATH="{path}" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return python


def times(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in folder.iterdir() if file.suffix in (".md", ".json")}


@pytest.mark.slow
def test_without_a_gpu_one_line_says_so(tmp_path: Path) -> None:
    done = report(tmp_path / "results")
    assert done.returncode == 2
    [line] = done.stdout.splitlines()
    assert line.startswith("gpu_report: torch sees no GPU here")
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("arguments", "python", "told"),
    [
        (["--fast"], sys.executable, "unknown arguments --fast"),
        (["one", "two"], sys.executable, "unknown arguments one two"),
        (["results"], "/no/such/python", "no Python at /no/such/python; run bash launch/setup.sh once, or set PYTHON"),
    ],
)
def test_what_it_cannot_use_is_one_line(arguments: list[str], python: str, told: str) -> None:
    done = report(*arguments, python=python)
    assert done.returncode == 2
    [line] = done.stdout.splitlines()
    assert told in line


@pytest.mark.exhaustive
@pytest.mark.parametrize("part", ["throughput", "all"])
def test_it_measures_and_goes_on_where_it_was_stopped(tmp_path: Path, pretending: Path, part: str) -> None:
    results = tmp_path / "results"
    results.mkdir()
    (results / "gpu-tests.done").touch()  # they have a tier of their own
    small = {"MODELS": "test_resnet", "BATCH_SIZE": "4", "REPEATS": "1"}
    if part == "throughput":
        (results / "of.txt").write_text("test_resnet 4 1\n")
        (results / "steps.done").touch()
        (results / "memory.done").touch()
    done = report(results, python=pretending, **small)
    logs = "\n".join(log.read_text() for log in results.glob("*.log"))
    assert done.returncode == 0, done.stdout + logs
    assert "gpu-tests    done before" in done.stdout
    tables = {file.name.split("_")[0]: file for file in results.glob("*.json")}
    assert set(tables) == (TABLES if part == "all" else {"throughput"})
    rows = {row["loop"]: row for row in json.loads(tables["throughput"].read_text())["rows"]}
    assert {"timm's plain loop", "SparseSAM, ρ = 0", "sam", "cut 0.5", "moving cut", "element 50%"} <= set(rows)
    for loop, row in rows.items():
        assert row["precision"] == "bf16", loop
        assert (row["batch_size"], row["resolution"]) == (4, 224)
        assert row["host_waits"] == 0, loop
        assert row["mfu"] == pytest.approx(row["base_step_flops"] / row["seconds"] / row["peak_flops"])
    # What a base step computes does not depend on how fast it is.
    assert len({row["base_step_flops"] for row in rows.values()}) == 1
    assert list(results.glob("trace_test_resnet.json.gz"))
    assert "timm's plain loop" in done.stdout

    before = times(results)
    again = report(results, python=pretending, **small)
    assert again.returncode == 0, again.stdout
    assert again.stdout.count("done before") == 4
    assert times(results) == before

    # Another model is another report, and a part that fails does not end the others.
    failed = report(results, python=pretending, **small | {"MODELS": "test_resnett"})
    assert failed.returncode == 1
    assert "gpu-tests    done before" in failed.stdout
    assert "failed: throughput steps memory" in failed.stdout
    assert "knows no model 'test_resnett'; nearest: test_resnet" in failed.stdout
    assert "Traceback" not in failed.stdout

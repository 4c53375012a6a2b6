"""Whatever happens to trainings, they end with the weights of those that were left alone."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from tests.support.checkout import ROOT
from tests.support.processes import run


def happen(folder: Path, *options: str, timeout: float) -> list[dict[str, str]]:
    """The rows that `python -m tests.faults` records, all of which have to be as they should be."""
    command = [sys.executable, "-m", "tests.faults", *options, "--record", folder]
    done = run(command, cwd=ROOT, timeout=timeout)
    assert done.returncode == 0, done.stdout
    (raw,) = folder.glob("faults_*.json")
    (table,) = folder.glob("faults_*.md")
    rows = json.loads(raw.read_text())["rows"]
    events = [row for row in rows if row["what"] == "event"]
    attempts = [int(found[1]) for found in re.finditer(r"^\| [^|]+ \| (\d+) \| .* \| 0 \|$", table.read_text(), re.M)]
    assert sum(attempts) == len(events)
    for chain in rows:
        if chain["what"] == "chain":
            assert chain["interrupted"] == chain["uninterrupted"]
            assert re.fullmatch("[0-9a-f]{64}", chain["interrupted"])
    return events


@pytest.mark.slow
def test_a_handful_of_faults_changes_nothing(tmp_path: Path) -> None:
    """Real trainings are started three times."""
    options = "--events", "3", "--epochs", "8", "--backend", "one process"
    assert len(happen(tmp_path, *options, timeout=600)) == 3


@pytest.mark.exhaustive
@pytest.mark.timeout(7200)
def test_two_hundred_faults_on_all_backends_change_nothing(tmp_path: Path) -> None:
    """Each kind of fault happens, on every backend several: some 20 minutes."""
    events = happen(tmp_path, "--events", "210", "--seed", "3", timeout=7000)
    assert len(events) == 210
    sharded = ["fsdp2", "zero1", "zero2", "zero3"]
    chunks = [f"{backend}, sharded checkpoints" for backend in ("fsdp2", "zero3")]
    assert {event["backend"] for event in events} == {"one process", "ddp", *sharded, *chunks}
    assert len({event["fault"] for event in events}) == 17


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--backend", "zero9"], "--backend zero9: one of one process, ddp, fsdp2, "),
        (["--only", "launcher$", "--backend", "one process"], "nothing of that ends a training of one process"),
    ],
    ids=["backend", "only"],
)
def test_what_cannot_happen_is_named(options: list[str], said: str) -> None:
    done = run([sys.executable, "-m", "tests.faults", *options], cwd=ROOT, timeout=300)
    assert done.returncode == 2
    assert said in done.stdout
    assert "Traceback" not in done.stdout

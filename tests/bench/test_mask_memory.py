"""`ssam-scale bench storage`, run as its users run it, on few weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ssam_scale.cli.main import main


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ssam_scale", "bench", "storage", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.exhaustive
def test_masks_take_a_bit_a_weight_or_less_and_weights_come_back() -> None:
    result = bench("--weights", "3000000", "--json")
    assert result.returncode == 0, result.stderr
    rows = {row["what"]: row for row in json.loads(result.stdout)}
    assert all(row["exact"] and row["weights"] == 3_000_000 for row in rows.values())
    for what, density in (("dense", 1.0), ("element 50%", 0.5), ("element 90%", 0.1)):
        assert rows[what]["density"] == pytest.approx(density, abs=1e-6)
    for what in ("row 50%", "tensor 50%"):
        assert 0.4 < rows[what]["density"] <= 0.5
    kept = {what: row["persistent_bytes_per_weight"] for what, row in rows.items()}
    assert kept["dense"] == kept["tensor 50%"] == 0.0
    # 152 tensors may each end within a byte.
    assert kept["element 50%"] == kept["element 90%"] == pytest.approx(1 / 8, abs=152 / 3_000_000)
    assert kept["row 50%"] < 9 / 512


def test_too_few_weights_are_the_users_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", "storage", "--weights", "7"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "ssam-scale: error: --weights is 7; at least 1000 are needed\n"


@pytest.mark.slow
def test_record_writes_the_table_and_beside_it_the_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", "storage", "--weights", "1000", "--record", str(tmp_path), "--json"])
    assert not ended.value.code
    table, raw = sorted(tmp_path.iterdir(), key=lambda path: path.suffix, reverse=True)
    assert (table.suffix, raw.suffix, table.stem) == (".md", ".json", raw.stem)
    assert table.stem.startswith("mask-memory_")
    rows = json.loads(raw.read_text())
    assert rows["rows"] == json.loads(capsys.readouterr().out)
    assert {"command", "commit", "versions", "hardware"} < rows.keys()
    lines = [line for line in table.read_text().splitlines() if line.startswith("| ")]
    assert len(lines) == 2 + len(rows["rows"])
    assert len({line.count("|") for line in lines}) == 1


@pytest.mark.parametrize("what", ["storage", "steps", "memory", "bytes", "masks"])
def test_a_folder_that_is_not_there_is_said_before_anything_is_measured(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", what, "--record", str(tmp_path / "results")])
    assert ended.value.code == 2
    said = f"--record is {tmp_path / 'results'}, which is not a folder; make it, or name one that is there"
    assert capsys.readouterr().err == f"ssam-scale: error: {said}\n"

"""The comparison with other SAMs, as a reader runs it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.support.processes import run

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "peers.py"


@pytest.mark.exhaustive
def test_ours_equals_the_reference_under_fsdp2_and_the_table_says_what_the_others_do(tmp_path: Path) -> None:
    pytest.importorskip("pytorch_optimizer", reason="needs pytorch_optimizer (the bench extra)")
    output = tmp_path / "peers.md"
    done = run([sys.executable, SCRIPT, "--output", output], cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in output.read_text().splitlines() if "|" in line]
    ours = [row for row in rows if "SparseSAM" in row[0]]
    assert len(ours) == 2
    for _, _, difference, drift, returned in ours:
        # fp32: the same arithmetic in another order of summation.
        assert float(difference) <= 1e-6
        assert float(drift) == 0.0
        assert returned == "5 of 5"
    # What the table is for: giving a DTensor its old tensor back does not restore the shard that FSDP2 computes with.
    [textbook] = [row for row in rows if "p.data = old" in row[1]]
    assert textbook[-1] == "0 of 5"
    assert len([row for row in rows if row[0].startswith("pytorch_optimizer")]) == 2

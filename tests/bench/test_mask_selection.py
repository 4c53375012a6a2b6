"""`ssam-scale bench masks`, run as its users run it, with few scores."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from ssam_scale.bench.mask_selection import tensor_sizes
from ssam_scale.cli.main import main


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ssam_scale", "bench", "masks", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.exhaustive
def test_rows_are_exact_on_one_and_two_processes() -> None:
    result = bench("--scores", "30011", "--ranks", "1", "--ranks", "2", "--repeats", "1", "--means", "--json")
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout)
    whats = ["top_k", "top_k, 60% zeros", "unit_means"]
    assert [(row["ranks"], row["what"]) for row in rows] == [(ranks, what) for ranks in (1, 2) for what in whats]
    for row in rows:
        assert row["scores"] == 30011
        assert row["exact"] is True
        assert row["seconds"] > 0
        assert row["extra_bytes_per_weight"] is None or row["extra_bytes_per_weight"] >= 0
        assert (row["collective_bytes"] > 0) == (row["ranks"] == 2)
        if row["what"] != "unit_means":
            assert row["topk_time_over_ours"] == row["topk_seconds"] / row["seconds"]
            assert row["unsorted_topk_time_over_ours"] == row["unsorted_topk_seconds"] / row["seconds"]
    # Three histograms; where scores at the threshold are left out, also how many there are in each of 152 tensors, for
    # both processes.
    histograms = 8 * (2**11 + 2**11 + 2**10)
    sent = [row["collective_bytes"] for row in rows[3:5]]
    assert sent == [histograms, histograms + 8 * 2 * len(tensor_sizes(30011)[0])]


@pytest.mark.exhaustive
def test_a_table_for_people() -> None:
    result = bench("--scores", "5", "--ranks", "1", "--repeats", "1")
    assert result.returncode == 0, result.stderr
    assert "topk / ours" in result.stdout
    assert "60% zeros" in result.stdout


@pytest.mark.parametrize("option", ["--scores", "--ranks", "--repeats"])
def test_nothing_to_measure_is_the_users_mistake(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", "masks", option, "0"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"ssam-scale: error: {option} is 0; at least 1 is needed\n"


@pytest.mark.parametrize("total", [1, 151, 30011, 86_000_000])
def test_sizes_add_up(total: int) -> None:
    sizes, _ = tensor_sizes(total)
    assert sum(sizes) == total
    assert min(sizes) >= 0

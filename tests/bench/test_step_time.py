"""`ssam-scale bench steps`, run as its users run it, on small networks."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssam_scale.bench.networks import setting_of
from ssam_scale.bench.scenarios import scenarios, select_scenarios
from ssam_scale.bench.step_time import bytes_to_perturb, interquartile_range, typical
from ssam_scale.cli.main import main
from ssam_scale.costs.compute import (
    PassTimes,
    StageTimes,
    StepShape,
    StepTimes,
    base_seconds,
    predicted_over_base,
    suffix_share,
)
from ssam_scale.masks.subset import BitMask, pack

SMALL = ["--resolution", "32", "--batch-size", "4", "--repeats", "1"]
MODELS = {"test_vit": 6, "test_resnet": 4}  # blocks
Row = dict[str, Any]
measuring = pytest.mark.slow  # every plan on two networks, once for all tests that look at them


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "ssam_scale", "bench", "steps", *arguments]
    return subprocess.run(line, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def measured() -> list[Row]:
    models = [part for model in MODELS for part in ("--models", model)]
    result = bench(*models, *SMALL, "--json")
    assert result.returncode == 0, result.stderr
    rows: list[Row] = json.loads(result.stdout)
    return rows


def rows_of(model: str, measured: list[Row]) -> dict[str, Row]:
    return {row["plan"]: row for row in measured if row["model"] == model}


def parts_of(rows: dict[str, Row]) -> StepTimes:
    parts = rows["base"]["parts"]
    passes = tuple(
        PassTimes(each["images"], tuple(StageTimes(**stage) for stage in each["stages"])) for each in parts["passes"]
    )
    return StepTimes(passes, parts["optimizer"], parts["perturb"], parts["images"])


@measuring
@pytest.mark.parametrize("model", MODELS)
def test_every_plan_has_its_row(model: str, measured: list[Row]) -> None:
    rows = rows_of(model, measured)
    compared = select_scenarios(None, scenarios(), batch_size=4)  # an eighth of which were no image
    assert list(rows) == [scenario.name for scenario in compared]
    assert {"momentum", "friendly"} < set(rows)
    for scenario, row in zip(compared, rows.values(), strict=True):
        assert row["time_over_base"] == row["seconds"] / rows["base"]["seconds"] > 0.0
        assert row["steps"] == scenario.steps
        assert row["fraction"] == scenario.fraction
        assert (row["batch_size"], row["resolution"], row["precision"], row["device"]) == (4, 32, "fp32", "cpu")
        assert row["versions"].keys() >= {"python", "torch", "timm"}
        assert row["hardware"]
        assert (row["predicted_over_base"] is None) == (scenario.mask is None and scenario.name != "base")
        assert (row["perturb_over_floor"] is None) == (scenario.mask is None)
        if scenario.mask is not None:
            assert row["perturb_over_floor"] == row["perturb_seconds"] / row["perturb_floor_seconds"] > 0.0
            assert row["perturb_seconds"] < row["seconds"] * scenario.interval
    assert rows["base"]["time_over_base"] == rows["base"]["predicted_over_base"] == 1.0
    assert rows["base"]["density"] == rows["base"]["suffix_share"] == 0.0
    for steps in (2, 5):
        interval = rows[f"interval {steps}"]
        assert interval["interval"] == steps
        assert [interval["density"], interval["suffix_share"]] == pytest.approx([1.0 / steps, 1.0 / steps])
    for name in ("sam", "textbook"):
        assert rows[name]["density"] == rows[name]["suffix_share"] == 1.0


@measuring
@pytest.mark.parametrize("model", MODELS)
def test_cuts_perturb_and_cost_what_lies_behind_them(model: str, measured: list[Row]) -> None:
    rows, blocks = rows_of(model, measured), MODELS[model]
    times = parts_of(rows)
    assert len(times.stages) == blocks
    last = (1.0, 1.0)
    for share in (0.25, 0.5, 0.75):
        row, cut = rows[f"cut {share}"], round(share * blocks)
        assert row["suffix_share"] == pytest.approx(suffix_share(times, cut))
        assert row["suffix_share"] < last[0]
        assert row["density"] < last[1]
        assert row["target_over_base"] == pytest.approx(1.1 * (1.0 + row["suffix_share"]))
        last = row["suffix_share"], row["density"]
    moving = rows["moving cut"]
    assert rows["cut 0.75"]["density"] / 2 < moving["density"] <= 1.0
    assert rows["sam"]["target_over_base"] == 2.05


@measuring
@pytest.mark.parametrize("model", MODELS)
def test_predictions_follow_from_the_parts_listed(model: str, measured: list[Row]) -> None:
    rows = rows_of(model, measured)
    times = parts_of(rows)
    parts = rows["base"]["parts"]
    blocks = len(times.stages)
    whole, base = parts["base"] - parts["optimizer"], parts["base"]
    sam = rows["sam"]["predicted_over_base"]
    # One more pass, between the time of the base step without and with its optimizer, and the perturbation.
    assert 1.0 + whole / base <= sam * (1.0 + 1e-9)
    weights = sum(p.numel() for p in setting_of(model, 32, 4).network().parameters())
    assert sam == pytest.approx(1.0 + (whole + times.perturb * weights) / base)
    for share in (0.25, 0.5, 0.75):
        predicted, cut = rows[f"cut {share}"]["predicted_over_base"], round(share * blocks)
        kept = tuple(float(i >= cut) for i in range(blocks))
        alone = predicted_over_base(times, [StepShape(cut, kept, 0)])
        assert 1.0 < alone <= predicted <= sam * (1.0 + 1e-9)
        half = predicted_over_base(times, [StepShape(cut, kept, 0, 0.5)])
        few = replace(times, images=2)  # of four
        alone_of_few = base_seconds(few) * (predicted_over_base(few, [StepShape(cut, kept, 0)]) - 1.0)
        assert half == pytest.approx(1.0 + alone_of_few / base)
        assert rows[f"cut {share}, fraction 0.5"]["predicted_over_base"] == pytest.approx(half + predicted - alone)
    for steps in (2, 5):
        assert rows[f"interval {steps}"]["predicted_over_base"] == pytest.approx(1.0 + (sam - 1.0) / steps)
    for name in ("tensor 50%", "block 50%", "norm", "element 50%"):
        assert 1.0 < rows[name]["predicted_over_base"] <= sam * (1.0 + 1e-9)
    # Without its saving a plan perturbs the same and costs no less.
    for plan, saving in (
        ("cut 0.5", "no shared prefix"),
        *((f"{pattern} 50%", "not elided") for pattern in ("tensor", "block", "row")),
    ):
        without = rows[f"{plan}, {saving}"]
        assert without["density"] == rows[plan]["density"]
        assert rows[plan]["predicted_over_base"] <= without["predicted_over_base"] <= sam * (1.0 + 1e-9)


@measuring
@pytest.mark.parametrize("model", MODELS)
def test_masks_have_the_density_asked_for(model: str, measured: list[Row]) -> None:
    rows = rows_of(model, measured)
    assert rows["element 50%"]["density"] == pytest.approx(0.5, abs=1e-5)
    for name in ("tensor 50%", "block 50%"):
        assert 0.1 < rows[name]["density"] <= 0.5
    assert 0.0 < rows["norm"]["density"] < 0.05


@pytest.mark.slow
def test_a_table_of_some_plans_for_people() -> None:
    result = bench("--models", "test_resnet", *SMALL, "--plans", "cut 0.5")
    assert result.returncode == 0, result.stderr
    assert "time / base" in result.stdout
    assert "perturb / floor" in result.stdout
    assert "cut 0.5" in result.stdout
    assert "cut 0.25" not in result.stdout
    assert "fp32" in result.stdout


@pytest.mark.parametrize("command", ["steps", "memory"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--repeats", "0"], "--repeats is 0; at least 1 is needed"),
        (["--batch-size", "3"], "--batch-size is 3; at least 4 are needed"),
        (["--resolution", "0"], "--resolution is 0; at least 1 is needed"),
        (["--models", "resnet50x"], "knows no model 'resnet50x'; nearest: resnet50"),
        (["--models", "test_byobnet"], "ByobNet has no stages"),
        (["--models", "test_vit", "--resolution", "33"], "test_vit does not take images of 33 × 33"),
        (["--plans", "cut"], "there is no plan 'cut'; there are 'base', 'sam'"),
    ],
)
def test_mistakes_are_the_users_in_one_line(
    command: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", command, *arguments])
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("ssam-scale: error: ")
    assert message in said.err
    assert said.err.count("\n") == 1


@pytest.mark.exhaustive  # by a clock
@pytest.mark.parametrize("model", ["test_vit", "test_resnet"])
def test_what_a_small_ascent_adds_is_predicted_nearer_by_passes_of_its_size_than_in_proportion(model: str) -> None:
    """Eight images of 64, on networks whose layers have little to do: the whole step in turns, in one process."""
    size = ["--models", model, "--resolution", "32", "--batch-size", "64", "--repeats", "15"]
    result = bench(*size, "--plans", "first 1/8", "--json")
    assert result.returncode == 0, result.stderr
    rows = {row["plan"]: row for row in json.loads(result.stdout)}
    times, row = parts_of(rows), rows["first 1/8"]
    everything = StepShape(0, (1.0,) * len(times.stages), 0, 1 / 8)
    in_proportion = StepTimes.proportional(times.stages, times.optimizer, times.perturb)
    gap = predicted_over_base(in_proportion, [everything]) - predicted_over_base(times, [everything])
    measured, predicted = (row[key] - 1.0 for key in ("time_over_base", "predicted_over_base"))
    print(f"{model}: ascent over base {measured:.3f}, predicted {predicted:.3f}, in proportion {predicted + gap:.3f}")
    assert abs(predicted - measured) < abs(predicted + gap - measured)


def test_typical_is_the_mean_over_kinds_of_medians() -> None:
    kinds = [(0, True), (0, False), (0, False), (0, False)]
    assert typical(kinds, [9.0, 1.0, 2.0, 300.0]) == (9.0 + 3 * 2.0) / 4
    assert typical([(2, True)] * 3, [3.0, 1.0, 2.0]) == 2.0


def test_spread_is_the_interquartile_range() -> None:
    assert interquartile_range(np.array([1.0])) == 0.0
    assert interquartile_range(np.arange(5.0)) == 2.0


@given(st.lists(st.booleans(), min_size=1, max_size=200), st.sampled_from([32, 64]))
def test_what_perturbing_must_move_counts_whole_lines(chosen: list[bool], line: int) -> None:
    weight, each = torch.zeros(len(chosen)), line // 4
    lines = {place // each for place, one in enumerate(chosen) if one}
    subset = BitMask(pack(torch.tensor(chosen)), len(chosen))
    assert bytes_to_perturb(weight, subset, line) == 5 * line * len(lines) + 8 * sum(chosen)
    assert bytes_to_perturb(weight, None, line) == 28 * len(chosen)

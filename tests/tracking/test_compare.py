"""Comparisons of runs whose numbers are known: expected values are worked out by hand."""

from __future__ import annotations

import csv
import errno
import io
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console

from ssam_scale.cli.compare import compare_command, render
from ssam_scale.cli.main import app
from ssam_scale.config.schema import Config
from ssam_scale.errors import UserError
from ssam_scale.tracking import view
from ssam_scale.tracking.commands import interface_lines
from ssam_scale.tracking.compare import Question, Row, compare
from ssam_scale.tracking.compare.files import write_whole
from ssam_scale.tracking.compare.statistics import holm, welch
from ssam_scale.tracking.dense import ascends_densely, is_dense_sam
from ssam_scale.tracking.store import flatten, open_store
from tests.support.stored import Course

MakeConfig = Callable[..., Config]
Finish = Callable[..., str]

QUERY = f"runs?workflowType=machine_learning&{view.QUERY}"


def rows_of(uri: str, **question: Any) -> list[Row]:
    return list(compare(uri, "ssam_scale", Question(**question)).rows)


def text_of(uri: str, width: int = 160, **question: Any) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(render(compare(uri, "ssam_scale", Question(**question))))
    return console.export_text()


def test_the_quickstart_table(config: MakeConfig, uri: str, finish: Finish) -> None:
    for seed, top1, ms in ((0, 80.0, 100.0), (1, 82.0, 104.0), (2, 84.0, 96.0)):
        finish(config("base", seed=seed), top1=top1, ms=ms)
    for seed, top1, ms in ((0, 83.0, 210.0), (1, 85.0, 190.0)):
        finish(config("sam", seed=seed), top1=top1, ms=ms)
    finish(config("depth"), top1=84.5, ms=150.0, density=0.7)
    finish(config("element"), top1=83.5, ms=205.0)
    base, sam, depth, element = rows_of(uri)

    assert (base.method, base.runs, base.top1, base.top1_sd) == ("base", 3, 82.0, 2.0)
    assert base.step_seconds == pytest.approx(0.1, rel=1e-12)
    assert (base.time_over_base, base.density, base.mask) == (1.0, None, "")
    assert base.saving_over_sam == pytest.approx(0.5, rel=1e-12)

    assert (sam.method, sam.runs, sam.top1, sam.density, sam.mask) == ("sam", 2, 84.0, 1.0, "dense")
    assert sam.top1_sd == pytest.approx(2**0.5, rel=1e-12)
    assert sam.time_over_base == pytest.approx(2.0, rel=1e-12)
    assert sam.saving_over_sam == 0.0

    assert (depth.method, depth.mask, depth.density) == ("ssam-depth", "depth rotate 0.25–0.75", 0.7)
    assert (depth.runs, depth.top1, depth.top1_sd) == (1, 84.5, None)
    assert depth.time_over_base == pytest.approx(1.5, rel=1e-12)
    assert depth.saving_over_sam == pytest.approx(0.25, rel=1e-12)

    assert (element.method, element.mask) == ("ssam-element", "element fisher")
    assert element.density == pytest.approx(0.2, rel=1e-12)  # from the sparsity, as none was measured
    assert element.saving_over_sam == pytest.approx(-0.025, rel=1e-12)
    assert not any(row.settings for row in (base, sam, depth, element))

    lines = [line for line in text_of(uri).splitlines() if "│" in line]
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]
    assert cells == [
        ["base", "—", "—", "3", "82.00 ± 2.00", "−2.00 (p 0.29)", "100.0", "1.00", "50% [1]"],
        ["sam", "dense", "100%", "2", "84.00 ± 1.41", "—", "200.0", "2.00", "0%"],
        ["ssam-depth", "depth rotate 0.25–0.75", "70%", "1", "84.50", "+0.50 [2]", "150.0", "1.50", "25% [1]"],
        ["ssam-element", "element fisher", "20%", "1", "83.50", "−0.50 [2]", "205.0", "2.05", "−2% [1]"],
    ]
    assert "[1] between runs, whose times other work on the machine shifts" in text_of(uri)
    assert "[2] a test needs 2 seeds on each side, and there are 1 and 2" in text_of(uri)


def test_probes_count_more_than_times_of_different_runs(config: MakeConfig, uri: str, finish: Finish) -> None:
    """The base run had the machine for itself, and the others had not."""
    finish(config("base"), top1=80.0, ms=100.0)
    finish(config("sam"), top1=83.0, ms=300.0, probed=(100.0, 0.0, 0.0, 0.0))
    for seed, saving in ((0, 25.0), (1, 27.0)):
        probed = (50.0, saving, saving - 2.0, saving + 2.0)
        finish(config("depth", seed=seed), top1=84.0, ms=240.0, density=0.7, probed=probed)
    finish(config("element"), top1=83.5, ms=330.0, probed=(110.0, -5.0))
    base, sam, depth, element = rows_of(uri)
    assert (base.time_over_base, base.saving_over_sam, base.by_probes) == (1.0, 0.5, True)
    assert (sam.time_over_base, sam.saving_over_sam) == (2.0, 0.0)
    assert (depth.time_over_base, depth.saving_over_sam) == (1.5, 0.26)
    assert depth.saving_interval == pytest.approx((0.24, 0.28))
    assert (element.saving_over_sam, element.saving_interval) == (-0.05, None)
    text = text_of(uri)
    assert "26% (24% to 28%)" in text
    assert "−5%" in text


def test_what_base_saves_is_by_the_probes_of_dense_sam(config: MakeConfig, uri: str, finish: Finish) -> None:
    finish(config("base"), top1=80.0, ms=100.0)
    sam = finish(config("sam"), top1=83.0, ms=300.0, probed=(100.0, 0.0))
    client = open_store(uri, create=False)
    for bound, value in (("low", 60.0), ("high", 150.0)):
        client.log_metric(sam, f"summary/overhead_vs_base_percent_{bound}", value)
    base, dense = rows_of(uri)
    assert (base.saving_over_sam, base.by_probes) == (0.5, True)
    assert base.saving_interval == pytest.approx((1 - 1 / 1.6, 1 - 1 / 2.5))
    assert dense.time_over_base_interval == pytest.approx((1.6, 2.5))
    assert "2.00 (1.60 to 2.50)" in text_of(uri)


def test_dense_sam_is_not_one_that_ascends_now_and_then(config: MakeConfig, uri: str, finish: Finish) -> None:
    finish(config("base"), top1=80.0, ms=100.0)
    finish(config("sam"), top1=83.0, ms=200.0)
    sam = config("sam")
    assert sam.perturbation is not None
    rarely = sam.model_copy(update={"perturbation": sam.perturbation.model_copy(update={"interval": 5})})
    finish(rarely, top1=82.0, ms=120.0)
    finish(config("depth"), top1=84.0, ms=150.0, density=0.7)
    savings = {(row.method, row.step_seconds): row.saving_over_sam for row in rows_of(uri)}
    assert savings[("sam", 0.2)] == 0.0
    assert savings[("sam", 0.12)] == pytest.approx(0.4)
    assert savings[("ssam-depth", 0.15)] == pytest.approx(0.25)


def test_where_only_some_runs_have_probes_a_note_says_so(config: MakeConfig, uri: str, finish: Finish) -> None:
    finish(config("base"), top1=80.0, ms=100.0)
    finish(config("sam"), top1=83.0, ms=200.0, probed=(100.0, 0.0, 0.0, 0.0))
    for seed, probed in ((0, (50.0, 25.0)), (1, ())):
        why = {} if probed else {"saving": "unknown: 9 steps are too few"}
        finish(config("depth", seed=seed), top1=84.0, ms=160.0, density=0.7, probed=probed, **why)
    *_, depth = rows_of(uri)
    assert (depth.by_probes, depth.saving_interval) == (False, None)
    assert depth.saving_over_sam == pytest.approx(0.2)
    assert depth.notes["saving_over_sam"] == (
        "between runs, whose times other work on the machine shifts: not all have probes; 9 steps are too few"
    )


@pytest.mark.parametrize(
    ("mask", "method", "words", "density"),
    [
        ({"pattern": "nm", "n": 1, "samples": 8}, "ssam-nm", "1:4 fisher", None),
        ({"pattern": "row", "score": "gradient", "allocation": "erk"}, "ssam-row", "row gradient erk", 0.5),
        ({"pattern": "element", "labels": "sampled"}, "ssam-element", "element sampled fisher", 0.5),
        ({"pattern": "element", "dynamic": {}, "sparsity": 0.8}, "ssam-dynamic", "dynamic gradient/random", 0.2),
        (
            {"pattern": "element", "score": "accumulated", "sparsity_final": 0.9},
            "ssam-element",
            "element accumulated",
            None,
        ),
        ({"pattern": "block", "refresh_epochs": None}, "ssam-block", "block fisher chosen once", 0.5),
        ({"pattern": "tensor", "refresh_steps": 9}, "ssam-tensor", "tensor fisher", 0.5),
        ({"pattern": "norm"}, "ssam-norm", "norm", None),
        ({"pattern": "named", "parameters": ["fc", "a.*b"]}, "ssam-named", "named fc a.*b", None),
        ({"pattern": "depth", "policy": "fixed", "cut": 0.5}, "ssam-depth", "depth fixed 0.5", None),
        ({"pattern": "depth", "draw": "cost"}, "ssam-depth", "depth rotate 0–1 by cost", None),
        (
            {"pattern": "depth", "cut": [0.0, 0.5], "draw": "annealed", "cut_final": [0.5, 1.0]},
            "ssam-depth",
            "depth rotate 0–0.5 to 0.5–1",
            None,
        ),
    ],
)
def test_every_mask_in_words(
    config: MakeConfig,
    uri: str,
    finish: Finish,
    mask: dict[str, Any],
    method: str,
    words: str,
    density: float | None,
) -> None:
    values = config("sam").model_dump(mode="json")
    values["perturbation"]["mask"] = mask
    finish(Config.model_validate(values), top1=80.0, ms=100.0)
    (row,) = rows_of(uri)
    assert (row.method, row.mask) == (method, words)
    assert row.density == (None if density is None else pytest.approx(density))


def test_only_the_latest_finished_run_of_a_seed_counts(config: MakeConfig, uri: str, finish: Finish) -> None:
    finish(config("base", seed=0), top1=1.0, ms=1.0)
    latest = finish(config("base", seed=0), top1=80.0, ms=100.0)
    other = finish(config("base", seed=1), top1=90.0, ms=200.0)
    for status in ("FAILED", "KILLED", "RUNNING"):
        finish(config("base", seed=0), top1=2.0, ms=2.0, status=status)
    (row,) = rows_of(uri)
    assert (row.runs, row.top1, set(row.run_ids)) == (2, 85.0, {latest, other})
    assert row.step_seconds == pytest.approx(0.15, rel=1e-12)


def test_settings_appear_only_where_rows_would_look_alike(config: MakeConfig, uri: str, finish: Finish) -> None:
    finish(config("base"), top1=80.0, ms=100.0)
    finish(config("sam", rho=0.1), top1=81.0, ms=200.0)
    finish(config("sam", rho=0.2), top1=82.0, ms=220.0)
    base, low, high = rows_of(uri)
    assert [row.settings for row in (base, low, high)] == ["", "rho 0.1", "rho 0.2"]
    assert high.time_over_base == pytest.approx(2.2, rel=1e-12)
    assert "rho 0.2" in text_of(uri)


def test_times_are_compared_only_on_equal_terms(config: MakeConfig, uri: str, finish: Finish) -> None:
    finish(config("base"), top1=80.0, ms=100.0)
    finish(config("base"), top1=80.0, ms=50.0, hardware="gpu")
    finish(config("depth"), top1=81.0, ms=75.0, hardware="gpu")
    finish(config("depth"), top1=81.0, ms=90.0, backend="ddp", world_size="2")
    allowed = frozenset({"hardware"})
    rows = {(row.method, row.backend, row.settings): row for row in rows_of(uri, allowed=allowed)}
    assert len(rows) == 4
    on_gpu = rows["ssam-depth", "single", "hardware gpu, world_size 1"]
    assert on_gpu.time_over_base == pytest.approx(1.5, rel=1e-12)
    alone = rows["ssam-depth", "ddp", "hardware cpu, world_size 2"]
    assert (alone.time_over_base, alone.saving_over_sam) == (None, None)
    terms = "with resnet18, batch 64, 32 px, fp32, ddp on 2 process(es), on this hardware"
    assert alone.notes["time_over_base"] == f"no finished run of the base optimizer alone {terms}"
    assert alone.notes["saving_over_sam"] == f"no finished run of dense SAM {terms}"
    shown = text_of(uri, allowed=allowed)
    assert "— [" in shown
    assert f"] no finished run of dense SAM {terms}" in shown
    assert "different hardware: hardware cpu | gpu" in shown
    backends = [line.split("│")[2].strip() for line in shown.splitlines() if "│ ssam-depth" in line]
    assert backends == ["ddp", "single"]


def test_of_several_bases_the_one_most_alike_is_taken(config: MakeConfig, uri: str, finish: Finish) -> None:
    def with_lr(made: Config, lr: float) -> Config:
        return made.model_copy(update={"optimizer": made.optimizer.model_copy(update={"lr": lr})})

    finish(with_lr(config("base"), 0.1), top1=80.0, ms=100.0)
    finish(with_lr(config("base"), 0.5), top1=80.0, ms=125.0)
    finish(with_lr(config("sam"), 0.1), top1=80.0, ms=250.0)
    sam = rows_of(uri)[-1]
    assert sam.time_over_base == pytest.approx(2.5, rel=1e-12)


def test_missing_metrics_are_dashes_with_a_note(config: MakeConfig, uri: str, finish: Finish) -> None:
    finish(config("base"))
    (row,) = rows_of(uri)
    assert (row.top1, row.step_seconds, row.time_over_base) == (None, None, None)
    assert row.notes["time_over_base"] == row.notes["saving_over_sam"] == "base: no step time was recorded"
    assert "] base: no step time was recorded" in text_of(uri)


def test_a_group_selects_runs(config: MakeConfig, uri: str, finish: Finish) -> None:
    finish(config("base", seed=0), top1=80.0, ms=100.0, group="monday")
    finish(config("base", seed=1), top1=90.0, ms=100.0, group="tuesday")
    (row,) = rows_of(uri, group="tuesday")
    assert (row.runs, row.top1) == (1, 90.0)
    with pytest.raises(UserError, match=r"group 'friday'; the experiment has 2 FINISHED; its groups: '.*day', '.*day'"):
        rows_of(uri, group="friday")


def test_errors_say_what_would_work(config: MakeConfig, uri: str, finish: Finish, tmp_path: Any) -> None:
    with pytest.raises(UserError, match="did you mean 'Default'"):
        rows_of(uri)
    finish(config("base"), status="FAILED")
    with pytest.raises(UserError, match=r"no experiment 'ssam_scal' in sqlite.*did you mean 'ssam_scale'"):
        compare(uri, "ssam_scal")
    with pytest.raises(UserError, match="no finished run in experiment 'ssam_scale'; the experiment has 1 FAILED"):
        rows_of(uri)
    with pytest.raises(UserError, match="there is no database"):
        compare(f"sqlite:///{tmp_path}/none/x.db", "ssam_scale")
    assert not (tmp_path / "none").exists()
    with pytest.raises(UserError, match="no MLflow server answers"):
        compare("http://127.0.0.1:9", "ssam_scale")


def test_the_command_prints_table_and_address(
    config: MakeConfig, uri: str, finish: Finish, capsys: pytest.CaptureFixture[str]
) -> None:
    finish(config("base"), top1=80.0, ms=100.0)
    compare_command(uri, "ssam_scale")
    out = capsys.readouterr().out
    assert "80.00" in out
    assert out.splitlines()[-2].endswith(f"mlflow ui --backend-store-uri {uri} --port 5000")
    assert out.splitlines()[-1].endswith("http://127.0.0.1:5000/#/experiments/1/" + QUERY)


def test_json_round_trips(config: MakeConfig, uri: str, finish: Finish, capsys: pytest.CaptureFixture[str]) -> None:
    finish(config("base"), top1=80.0, ms=100.0)
    compare_command(uri, "ssam_scale", as_json=True)
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["method"], row["top1"], row["time_over_base"], row["top1_sd"]) == ("base", 80.0, 1.0, None)
    assert row == json.loads(json.dumps(rows_of(uri)[0].__dict__))


def test_time_to_an_accuracy_and_accuracy_at_equal_wall_clock(config: MakeConfig, uri: str, finish: Finish) -> None:
    for seed, last in ((0, 80.0), (1, 82.0)):
        finish(config("base", seed=seed), top1=last, ms=100.0, course=Course((60.0, 70.0, 75.0, last), 10.0))
    for seed, last in ((0, 84.0), (1, 86.0)):
        finish(config("sam", seed=seed), top1=last, ms=200.0, course=Course((61.0, 76.0, 81.0, last), 20.0 + seed))
    comparison = compare(uri, "ssam_scale")
    assert (comparison.accuracy, comparison.wall_clock) == (80.0, 40.0)  # base's worst seed, and base's time
    base, sam = comparison.rows
    assert (base.seconds, base.seconds_sd, base.images_per_second) == (40.0, 0.0, pytest.approx(320.0))
    assert (sam.seconds, sam.seconds_sd) == (82.0, pytest.approx(8**0.5))
    assert (base.seconds_to_accuracy, sam.seconds_to_accuracy) == (40.0, 61.5)  # 60 and 63 s
    assert (base.top1_at_wall_clock, sam.top1_at_wall_clock) == (81.0, 68.5)  # seed 1 ends its second epoch at 42 s
    assert "s to 80.00%" in text_of(uri)
    assert "top-1 at 40 s" not in text_of(uri)
    assert "top-1 at 40 s" in text_of(uri, wall_clock=40.0)

    base, sam = rows_of(uri, accuracy=81.5, wall_clock=15.0)
    assert (base.seconds_to_accuracy, base.notes["seconds_to_accuracy"]) == (None, "1 of 2 runs reached this top-1")
    assert (sam.seconds_to_accuracy, base.top1_at_wall_clock, sam.top1_at_wall_clock) == (82.0, 60.0, None)
    assert sam.notes["top1_at_wall_clock"] == "0 of 2 runs had an evaluation by then"


def test_seconds_of_training_where_epochs_are_missing_or_doubled(config: MakeConfig, uri: str, finish: Finish) -> None:
    client = open_store(uri, create=False)
    doubled = finish(config("base"), top1=3.0, ms=1.0, course=Course((1.0, 2.0, 3.0), 10.0))
    client.log_metric(doubled, "time/epoch", 16.0, timestamp=1_900_000_000_000, step=100)  # its second, once more
    half = finish(config("base", seed=1), top1=3.0, ms=1.0)  # resumed, in a run of its own, after two epochs
    for epoch, seconds in ((3, 10.0), (4, 14.0)):
        for key, value in (("epoch", epoch), ("time/epoch", seconds), ("val/top1", epoch)):
            client.log_metric(half, key, value, step=50 * epoch)
    started = client.get_run(without := finish(config("base", seed=2), top1=3.0, ms=1.0)).info.start_time
    client.log_metric(without, "val/top1", 5.0, timestamp=started + 30_000, step=50)
    client.log_metric(without, "time/probe", 4.0, timestamp=started + 9_000, step=25)
    client.log_metric(without, "time/probe", 9.0, timestamp=started + 90_000, step=75)
    client.log_metric(without, "val/top1", math.nan, timestamp=started + 99_000, step=100)
    comparison = compare(uri, "ssam_scale")
    found = {run.seed: run for run in comparison.groups[0].runs}
    assert [(each.seconds, each.epoch) for each in found["0"].curve] == [(10.0, 1), (26.0, 2), (36.0, 3)]
    assert [(each.seconds, each.epoch) for each in found["1"].curve] == [(30.0, 3), (48.0, 4)]
    assert [each.seconds for each in found["2"].curve] == [26.0]
    assert found["0"].seconds_by == ""
    note = comparison.rows[0].notes["seconds"]
    assert "each counts as the mean of the others" in note
    assert "by timestamps, with evaluations" in note


def test_images_per_second_are_all_images_over_all_steps(config: MakeConfig, uri: str, finish: Finish) -> None:
    client = open_store(uri, create=False)
    run_id = finish(config("base"), top1=3.0, ms=1.0)
    for step, rate in ((50, 100.0), (100, 300.0), (125, 100.0)):  # seconds go as 1/2, 1/6 and 1/4
        client.log_metric(run_id, "train/images_per_second", rate, step=step)
    resumed = finish(config("base", seed=1), top1=3.0, ms=1.0)
    for step, rate in ((1050, 100.0), (1100, 300.0)):
        client.log_metric(resumed, "train/images_per_second", rate, step=step)
    first, second = (run.images_per_second for run in compare(uri, "ssam_scale").groups[0].runs)
    assert first == pytest.approx(125 / (1 / 2 + 1 / 6 + 1 / 4))
    assert second == pytest.approx(150.0)


def test_a_run_that_was_changed_on_the_way_is_no_other_seed(config: MakeConfig, uri: str, finish: Finish) -> None:
    finish(config("base"), top1=80.0, ms=100.0)
    changed = {"changed.optimizer.lr": "0.2", "changed.checkpoint.keep": "9"}
    finish(config("base", seed=1), top1=82.0, ms=100.0, **changed)
    finish(config("base", seed=2), top1=84.0, ms=100.0, **{"changed.data.workers": "2"})
    assert [(row.runs, row.settings) for row in rows_of(uri)] == [(2, "lr 0.1"), (1, "lr 0.1, later 0.2")]


def test_accuracy_is_tested_by_welch_and_corrected_by_holm(config: MakeConfig, uri: str, finish: Finish) -> None:
    tops = {"base": (80.0, 80.4, 80.2), "sam": (83.0, 83.1, 82.9), "depth": (82.0, 82.6), "element": (82.9,)}
    for method, found in tops.items():
        for seed, top1 in enumerate(found):
            finish(config(method, seed=seed), top1=top1, ms=100.0)
    comparison = compare(uri, "ssam_scale")
    base, sam, depth, element = comparison.rows
    alone = [welch(tops[one], tops[other]) for one, other in (("base", "sam"), ("base", "depth"), ("sam", "depth"))]
    assert None not in alone
    corrected = holm([p for p in alone if p is not None])
    assert comparison.tests == 3  # base against SAM is SAM against base
    assert (base.p_over_base, base.gain_over_base) == (None, None)
    assert (base.p_over_sam, base.p_over_sam_alone) == (corrected[0], alone[0])
    assert (sam.p_over_base, depth.p_over_base, depth.p_over_sam) == tuple(corrected)
    assert (sam.gain_over_base, depth.gain_over_sam) == (pytest.approx(2.8), pytest.approx(-0.7))
    assert (element.gain_over_base, element.p_over_base) == (pytest.approx(2.7), None)
    assert element.notes["p_over_base"] == "a test needs 2 seeds on each side, and there are 1 and 3"
    assert "Holm's correction over 3 comparisons" in text_of(uri)


def test_accuracy_is_judged_against_the_same_model_and_data(config: MakeConfig, uri: str, finish: Finish) -> None:
    base = config("base")
    other = base.model_copy(update={"model": base.model.model_copy(update={"name": "resnet34"})})
    longer = base.model_copy(update={"train": base.train.model_copy(update={"epochs": 3})})
    finish(other, top1=70.0, ms=100.0)
    finish(config("sam"), top1=83.0, ms=200.0)
    *_, sam = sorted(rows_of(uri), key=lambda row: row.method)
    assert sam.gain_over_base is None
    assert sam.notes["gain_over_base"] == "no finished run of the base optimizer alone, same model and data"
    finish(longer, top1=81.0, ms=100.0)
    *_, sam = sorted(rows_of(uri), key=lambda row: row.method)
    assert sam.gain_over_base == 2.0
    assert sam.notes["gain_over_base"] == "the base optimizer alone differs in train.epochs, too"


def test_a_mask_is_judged_against_dense_sam_of_its_own_radius(config: MakeConfig, uri: str, finish: Finish) -> None:
    finish(config("sam", rho=0.1), top1=83.0, ms=200.0)
    finish(config("sam", rho=0.4), top1=70.0, ms=200.0)
    finish(config("depth", rho=0.1), top1=84.0, ms=150.0)
    finish(config("element", rho=0.2), top1=84.0, ms=150.0)
    *_, same, other = rows_of(uri)
    assert (same.gain_over_sam, "gain_over_sam" in same.notes) == (1.0, False)
    assert other.notes["gain_over_sam"] == "dense SAM differs in perturbation.rho, too"


def test_gpu_hours_and_cost(config: MakeConfig, uri: str, finish: Finish) -> None:
    where = {"gpus": "8 × H100", "world_size": "4", "hardware": "8 × H100"}
    for seed in (0, 1):
        finish(config("base", seed=seed), top1=80.0, ms=100.0, course=Course((80.0,), 3600.0 * (1 + seed)), **where)
    (row,) = rows_of(uri, price=2.0)
    assert (row.gpu_hours, row.gpu_hours_sd) == (6.0, pytest.approx(8**0.5))  # four processes, one GPU each
    assert (row.cost, row.cost_sd) == (12.0, pytest.approx(32**0.5))
    assert "12.00 ± 5.66" in text_of(uri, price=2.0)
    assert rows_of(uri)[0].cost is None
    finish(config("base"), top1=80.0, ms=100.0, course=Course((80.0,), 60.0), hardware="cpu")
    *_, cpu = rows_of(uri, price=2.0, allowed=frozenset({"hardware"}))
    assert (cpu.gpu_hours, cpu.cost) == (None, None)
    assert cpu.notes["cost"] == "no GPU, and the price is of one"


SOFTWARE = {"version__ssam_scale": "0.1.0", "version__torch": "2.13.0", "git_commit": "a" * 40}


@pytest.mark.parametrize(
    ("tags", "said"),
    [
        ({"hardware": "gpu"}, "hardware: cpu (base resnet18 "),
        ({"version__torch": "2.10.0"}, "software: torch 2.13.0 (base resnet18 "),
        ({"git_commit": "b" * 40}, "software: commit aaaaaaaaaaaa (base resnet18 "),
        ({"git_dirty": "true"}, "against aaaaaaaaaaaa with changes (sam resnet18 "),
        ({"version__cuda": "13.0"}, None),  # the other does not say
        ({"version__deepspeed": "0.19.8"}, None),  # nothing of it runs
        ({"digest": "1f"}, None),  # the other has none, and the files are called the same
    ],
)
def test_what_may_not_be_compared_is_refused(
    config: MakeConfig, uri: str, finish: Finish, tags: dict[str, str], said: str | None
) -> None:
    finish(config("base"), top1=80.0, ms=100.0, **SOFTWARE, version__deepspeed="0.18.0", group="monday")
    finish(config("sam"), top1=80.0, ms=100.0, **{**SOFTWARE, "group": "tuesday", **tags})
    if said is None:
        assert len(rows_of(uri)) == 2
        return
    aspect = "hardware" if "hardware" in tags else "software"
    with pytest.raises(UserError) as error:
        rows_of(uri)
    assert said in str(error.value)
    assert "--group takes one of monday, tuesday" in str(error.value)
    assert str(error.value).endswith(f"compare them nevertheless: --allow-different {aspect}")
    assert len(rows_of(uri, group="tuesday")) == 1
    assert f"different {aspect}: " in text_of(uri, allowed=frozenset({aspect}))


def test_only_runs_that_count_have_to_be_alike(config: MakeConfig, uri: str, finish: Finish) -> None:
    finish(config("base"), top1=1.0, ms=100.0, version__torch="2.10.0")
    finish(config("base"), top1=80.0, ms=100.0, version__torch="2.13.0")  # the same seed, later
    finish(config("sam"), top1=80.0, ms=100.0, version__torch="2.13.0")
    assert [row.top1 for row in rows_of(uri)] == [80.0, 80.0]


def test_seeds_by_different_software_are_one_row_with_a_note(config: MakeConfig, uri: str, finish: Finish) -> None:
    for seed, version in ((0, "2.10.0"), (1, "2.13.0")):
        finish(config("base", seed=seed), top1=80.0, ms=100.0, version__torch=version)
    with pytest.raises(UserError, match=r"--group takes runs that were trained with tracking\.group=NAME"):
        rows_of(uri)
    (row,) = rows_of(uri, allowed=frozenset({"software"}))
    assert (row.runs, row.notes["runs"]) == (2, "of different software: torch 2.10.0 | 2.13.0")


def test_data_are_known_by_their_digest_wherever_they_lie(config: MakeConfig, uri: str, finish: Finish) -> None:
    def reading(path: str, method: str = "base") -> Config:
        made = config(method)
        return made.model_copy(update={"data": made.data.model_copy(update={"train": path})})

    finish(reading("a.beton"), top1=80.0, ms=100.0, digest="1f", group="moved")
    finish(reading("b.beton", "sam"), top1=80.0, ms=100.0, digest="1f", group="moved")
    assert [(row.method, row.settings) for row in rows_of(uri)] == [("base", ""), ("sam", "")]
    assert rows_of(uri)[1].gain_over_base == 0.0
    finish(reading("a.beton", "depth"), top1=80.0, ms=100.0, digest="2e")
    with pytest.raises(UserError, match=r"data: training data 1f \(.*\) against 2e \(ssam-depth resnet18"):
        rows_of(uri)
    depth = rows_of(uri, allowed=frozenset({"data"}))[-1]
    assert depth.notes["gain_over_base"] == "no finished run of the base optimizer alone, same model and data"
    finish(reading("c.beton", "element"), top1=80.0, ms=100.0)  # one without: known by paths, all of them
    with pytest.raises(UserError, match=r"data: data\.train a\.beton \(.*against b\.beton \(.*against c\.beton \("):
        rows_of(uri)


def test_runs_that_go_on_are_rows_of_their_own_with_what_they_have(
    config: MakeConfig, uri: str, finish: Finish
) -> None:
    finish(config("base"), top1=80.0, ms=100.0, course=Course((70.0, 80.0), 10.0))
    probed = (50.0, 25.0, 24.0, 26.0)
    course = Course((65.0,), 15.0)
    finish(config("depth"), ms=150.0, density=0.7, probed=probed, course=course, status="RUNNING")
    assert [row.method for row in rows_of(uri)] == ["base"]
    comparison = compare(uri, "ssam_scale", Question(running=True))
    base, depth = comparison.rows
    assert (comparison.accuracy, comparison.wall_clock) == (80.0, 20.0)  # of what is finished
    assert (base.running, depth.running) == (False, True)
    assert (depth.top1, depth.step_seconds, depth.seconds) == (65.0, 0.15, 15.0)
    assert (depth.saving_over_sam, depth.saving_interval, depth.time_over_base) == (0.25, (0.24, 0.26), 1.5)
    assert depth.notes["gain_over_base"] == "the runs go on"
    assert "ssam-depth (running)" in text_of(uri, running=True)


def test_what_only_holds_runs_together_is_none(config: MakeConfig, uri: str, finish: Finish) -> None:
    parent = finish(config("base"))
    for seed in (0, 1):
        finish(config("base", seed=seed), top1=80.0, ms=100.0, mlflow__parentRunId=parent)
    client = open_store(uri, create=False)
    for run in client.search_runs(["1"]):  # the helper's tags have no dots
        if "mlflow/parentRunId" in run.data.tags:
            client.set_tag(run.info.run_id, "mlflow.parentRunId", parent)
    (row,) = rows_of(uri)
    assert (row.runs, parent in row.run_ids) == (2, False)


@pytest.mark.parametrize("width", [160, 100, 80, 60])
def test_numbers_stay_whole_at_any_width(config: MakeConfig, uri: str, finish: Finish, width: int) -> None:
    for seed in (0, 1):
        finish(config("base", seed=seed), top1=80.0 + seed, ms=100.0, course=Course((79.0, 80.0 + seed), 500.0))
        finish(
            config("depth", seed=seed),
            top1=81.0 + seed,
            ms=150.0,
            density=0.7,
            probed=(50.0, 25.0, 24.0, 26.0),
            course=Course((78.0, 81.0 + seed), 750.0),
        )
    text = text_of(uri, width)
    assert max(map(len, text.splitlines())) <= width
    for whole in ("80.50 ± 0.71", "81.50 ± 0.71", "25% (24% to 26%)", "1.50"):
        assert whole in text, text
    missing = [title for title in ("density", "step ms", "seconds") if title not in text]
    assert missing == []  # shown, or named among what was left out


COMPARE = ("compare", "--experiment", "ssam_scale")


def run_command(*arguments: str) -> None:
    command = typer.main.get_command(app)
    command.main(list(arguments), standalone_mode=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--accuracy", "100.5"], "--accuracy is 100.5; it is a percentage, 0 to 100"),
        (["--accuracy", "nan"], "--accuracy is nan"),
        (["--price", "-1"], "--price is -1; it is a number, 0 or above"),
        (["--price", "inf"], "--price is inf"),
        (["--wall-clock", "nan"], "--wall-clock is nan"),
        (["--watch", "0"], "--watch is 0; it is the seconds from one look to the next"),
        (["--watch", "--json"], "--watch draws a table for people"),
        (["--csv", "--json"], "--json and --csv would both print; give --csv a file"),
        (
            ["--allow-different", "hardware,disks"],
            "--allow-different 'disks': runs may differ in hardware, data, software",
        ),
        (["--html", "{tmp}"], "--html {tmp} is a folder; name a file in it, e.g. {tmp}/comparison.html"),
        (["--csv", "{tmp}/none/x.csv"], "--csv {tmp}/none/x.csv: there is no folder {tmp}/none; make it"),
        (["--html", "{tmp}/mlflow.db/x.html"], "--html {tmp}/mlflow.db/x.html: {tmp}/mlflow.db is not a folder"),
    ],
)
def test_mistakes_are_told_before_a_store_is_asked(options: list[str], message: str, uri: str, tmp_path: Path) -> None:
    placed = [option.replace("{tmp}", str(tmp_path)) for option in options]
    with pytest.raises(UserError) as error:
        run_command(*COMPARE, "--tracking-uri", "http://127.0.0.1:9", *placed)
    assert str(error.value).startswith(message.replace("{tmp}", str(tmp_path)))


def test_csv_is_printed_or_written_whole(
    config: MakeConfig, uri: str, finish: Finish, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finish(config("sam"), top1=80.0, ms=100.0, probed=(100.0, 30.0, 29.0, 31.0))
    run_command(*COMPARE, "--tracking-uri", uri, "--csv", "--price", "3")
    printed = capsys.readouterr().out
    (row,) = csv.DictReader(io.StringIO(printed))
    assert (row["method"], row["saving_interval_low"], row["time_over_base"]) == ("sam", "0.29", "2.0")
    assert "cost: no GPU" in row["notes"]
    run_command(*COMPARE, "--tracking-uri", uri, "--price", "3", "--json", "--csv", str(tmp_path / "rows.csv"))
    out, err = capsys.readouterr()
    assert json.loads(out)[0]["saving_interval"] == [0.29, 0.31]
    assert err == f"written: {tmp_path}/rows.csv\n"
    assert (tmp_path / "rows.csv").read_text() == printed


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, link = tmp_path / "page.html", tmp_path / "link.html"
    link.symlink_to(target)
    write_whole("--html", link, "old")
    target.chmod(0o640)
    assert (link.is_symlink(), target.read_text()) == (True, "old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"--html .*page\.html: No space left on device"):
            write_whole("--html", target, "new")
    assert (target.read_text(), len(list(tmp_path.iterdir()))) == ("old", 2)
    write_whole("--html", target, "new \udc80")
    assert (target.read_text(), target.stat().st_mode & 0o777) == ("new ?", 0o640)
    with pytest.raises(UserError, match="--csv /dev/full: No space left on device"):
        write_whole("--csv", Path("/dev/full"), "new")


def test_watching_draws_anew_until_interrupted(
    config: MakeConfig, uri: str, finish: Finish, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    finish(config("base"), top1=80.0, ms=100.0)
    slept = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 1:
            finish(config("sam"), top1=83.25, ms=200.0, course=Course((83.25,), 9.0), status="RUNNING")
        elif len(slept) == 2:  # another job begins, on another machine
            finish(config("depth"), top1=1.0, ms=200.0, hardware="gpu", status="RUNNING")
        else:
            raise KeyboardInterrupt

    monkeypatch.setattr("ssam_scale.cli.compare.time.sleep", sleep)
    run_command(*COMPARE, "--tracking-uri", uri, "--watch")
    out = " ".join(capsys.readouterr().out.split())
    assert slept == [10.0, 10.0, 10.0]
    assert out.count("sam (running)") >= 2  # again when the third cannot be compared
    assert "these runs are not comparable" in out
    assert "Ctrl-C ends" in out


@pytest.mark.parametrize(
    ("perturbation", "ascents", "steps"),
    [
        (None, False, False),
        ({}, True, True),
        ({"direction": {"fraction": 0.5}}, False, False),
        ({"interval": 5}, True, False),
        ({"window": [0.5, 1.0]}, True, False),
        ({"direction": {"scope": "shard_group"}}, False, False),  # of fsdp2 with replicas
        ({"mask": {"pattern": "depth", "cut": 0.5}}, False, False),
        ({"mask": {"pattern": "norm"}}, False, False),
    ],
)
def test_what_dense_sam_is(config: MakeConfig, perturbation: Any, ascents: bool, steps: bool) -> None:
    values = config("base").model_dump(mode="json")
    values["perturbation"] = None if perturbation is None else {"rho": 0.1, **perturbation}
    values["sharding"] = {"backend": "fsdp2", "replicas": 2}
    params = flatten(Config.model_validate(values))
    assert (ascends_densely(params), is_dense_sam(params)) == (ascents, steps)


def test_address_of_a_server_is_its_own() -> None:
    assert interface_lines("http://me:pw@host:5000/", "7", "ab") == [
        "in the browser: http://me:***@host:5000/#/experiments/7/runs/ab"
    ]
    assert "me:***@host/db" in interface_lines("postgresql://me:pw@host/db", "7", "ab")[0]
    assert interface_lines("http://me:pw@host:5000/", "7") == [
        "In the browser: http://me:***@host:5000/#/experiments/7/" + QUERY
    ]

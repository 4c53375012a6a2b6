"""Comparisons of runs whose numbers are known: expected values are worked out by hand."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

from ssam_scale.cli.compare import compare_command, render
from ssam_scale.config.schema import Config
from ssam_scale.errors import UserError
from ssam_scale.tracking import view
from ssam_scale.tracking.commands import interface_lines
from ssam_scale.tracking.compare import Row, compare
from ssam_scale.tracking.run import flatten
from ssam_scale.tracking.store import experiment_id, open_store

MakeConfig = Callable[..., Config]
Finish = Callable[..., str]

QUERY = f"runs?workflowType=machine_learning&{view.QUERY}"

_start = itertools.count(1_700_000_000_000, 1000)


@pytest.fixture
def finish(uri: str) -> Finish:
    """`finish(config, top1=…, ms=…)` stores a run that ended like that; later calls are later runs."""
    client = open_store(uri, create=False)
    from mlflow.entities import Metric, Param

    def make(
        config: Config,
        *,
        top1: float | None = None,
        ms: float | None = None,
        density: float | None = None,
        probed: tuple[float, ...] = (),
        status: str = "FINISHED",
        **tags: str,
    ) -> str:
        where = {"backend": "single", "world_size": "1", "hardware": "cpu"}
        experiment = experiment_id(client, uri, config.tracking.experiment)
        run_id = str(
            client.create_run(
                experiment, start_time=next(_start), tags={"method": config.method} | where | tags
            ).info.run_id
        )
        seconds = None if ms is None else ms / 1000
        found = {"summary/top1": top1, "summary/step_time": seconds, "summary/density": density}
        names = ("overhead_vs_base_percent", *(f"saving_vs_dense_percent{bound}" for bound in ("", "_low", "_high")))
        found |= {f"summary/{name}": value for name, value in zip(names, probed, strict=False)}
        client.log_batch(
            run_id,
            params=[Param(key, value) for key, value in flatten(config).items()],
            metrics=[Metric(key, value, 0, 0) for key, value in found.items() if value is not None],
        )
        client.set_terminated(run_id, status)
        return run_id

    return make


def text_of(rows: list[Row]) -> str:
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(render(rows))
    return console.export_text()


def test_the_quickstart_table(config: MakeConfig, uri: str, finish: Finish) -> None:
    for seed, top1, ms in ((0, 80.0, 100.0), (1, 82.0, 104.0), (2, 84.0, 96.0)):
        finish(config("base", seed=seed), top1=top1, ms=ms)
    for seed, top1, ms in ((0, 83.0, 210.0), (1, 85.0, 190.0)):
        finish(config("sam", seed=seed), top1=top1, ms=ms)
    finish(config("depth"), top1=84.5, ms=150.0, density=0.7)
    finish(config("element"), top1=83.5, ms=205.0)
    base, sam, depth, element = compare(uri, "ssam_scale")

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
    assert not any(row.notes or row.settings for row in (base, sam, depth, element))

    lines = [line for line in text_of([base, sam, depth, element]).splitlines() if "│" in line]
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]
    assert cells == [
        ["base", "—", "—", "3", "82.00 ± 2.00", "100.0", "1.00", "50%"],
        ["sam", "dense", "100%", "2", "84.00 ± 1.41", "200.0", "2.00", "0%"],
        ["ssam-depth", "depth rotate 0.25–0.75", "70%", "1", "84.50", "150.0", "1.50", "25%"],
        ["ssam-element", "element fisher", "20%", "1", "83.50", "205.0", "2.05", "−2%"],
    ]


def test_probes_count_more_than_times_of_different_runs(config: MakeConfig, uri: str, finish: Finish) -> None:
    """The base run had the machine for itself, and the others had not."""
    finish(config("base"), top1=80.0, ms=100.0)
    finish(config("sam"), top1=83.0, ms=300.0, probed=(100.0, 0.0, 0.0, 0.0))
    for seed, saving in ((0, 25.0), (1, 27.0)):
        probed = (50.0, saving, saving - 2.0, saving + 2.0)
        finish(config("depth", seed=seed), top1=84.0, ms=240.0, density=0.7, probed=probed)
    finish(config("element"), top1=83.5, ms=330.0, probed=(110.0, -5.0))
    base, sam, depth, element = compare(uri, "ssam_scale")
    assert (base.time_over_base, base.saving_over_sam, base.by_probes) == (1.0, 0.5, True)
    assert (sam.time_over_base, sam.saving_over_sam) == (2.0, 0.0)
    assert (depth.time_over_base, depth.saving_over_sam) == (1.5, 0.26)
    assert depth.saving_interval == pytest.approx((0.24, 0.28))
    assert (element.saving_over_sam, element.saving_interval) == (-0.05, None)
    text = text_of([base, sam, depth, element])
    assert "26% (24% to 28%)" in text
    assert "−5%" in text


def test_dense_sam_is_not_one_that_ascends_now_and_then(config: MakeConfig, uri: str, finish: Finish) -> None:
    finish(config("base"), top1=80.0, ms=100.0)
    finish(config("sam"), top1=83.0, ms=200.0)
    sam = config("sam")
    assert sam.perturbation is not None
    rarely = sam.model_copy(update={"perturbation": sam.perturbation.model_copy(update={"interval": 5})})
    finish(rarely, top1=82.0, ms=120.0)
    finish(config("depth"), top1=84.0, ms=150.0, density=0.7)
    savings = {(row.method, row.step_seconds): row.saving_over_sam for row in compare(uri, "ssam_scale")}
    assert savings[("sam", 0.2)] == 0.0
    assert savings[("sam", 0.12)] == pytest.approx(0.4)
    assert savings[("ssam-depth", 0.15)] == pytest.approx(0.25)


def test_where_only_some_runs_have_probes_a_note_says_so(config: MakeConfig, uri: str, finish: Finish) -> None:
    finish(config("base"), top1=80.0, ms=100.0)
    finish(config("sam"), top1=83.0, ms=200.0, probed=(100.0, 0.0, 0.0, 0.0))
    for seed, probed in ((0, (50.0, 25.0)), (1, ())):
        finish(config("depth", seed=seed), top1=84.0, ms=160.0, density=0.7, probed=probed)
    *_, depth = compare(uri, "ssam_scale")
    assert (depth.by_probes, depth.saving_interval) == (False, None)
    assert depth.saving_over_sam == pytest.approx(0.2)
    assert depth.notes == ("times of different runs, which other work on the machine shifts: no probes in it",)


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
    (row,) = compare(uri, "ssam_scale")
    assert (row.method, row.mask) == (method, words)
    assert row.density == (None if density is None else pytest.approx(density))


def test_only_the_latest_finished_run_of_a_seed_counts(config: MakeConfig, uri: str, finish: Finish) -> None:
    finish(config("base", seed=0), top1=1.0, ms=1.0)
    latest = finish(config("base", seed=0), top1=80.0, ms=100.0)
    other = finish(config("base", seed=1), top1=90.0, ms=200.0)
    for status in ("FAILED", "KILLED", "RUNNING"):
        finish(config("base", seed=0), top1=2.0, ms=2.0, status=status)
    (row,) = compare(uri, "ssam_scale")
    assert (row.runs, row.top1, set(row.run_ids)) == (2, 85.0, {latest, other})
    assert row.step_seconds == pytest.approx(0.15, rel=1e-12)


def test_settings_appear_only_where_rows_would_look_alike(config: MakeConfig, uri: str, finish: Finish) -> None:
    finish(config("base"), top1=80.0, ms=100.0)
    finish(config("sam", rho=0.1), top1=81.0, ms=200.0)
    finish(config("sam", rho=0.2), top1=82.0, ms=220.0)
    base, low, high = compare(uri, "ssam_scale")
    assert [row.settings for row in (base, low, high)] == ["", "rho 0.1", "rho 0.2"]
    assert high.time_over_base == pytest.approx(2.2, rel=1e-12)
    assert "rho 0.2" in text_of([base, low, high])


def test_times_are_compared_only_on_equal_terms(config: MakeConfig, uri: str, finish: Finish) -> None:
    finish(config("base"), top1=80.0, ms=100.0)
    finish(config("base"), top1=80.0, ms=50.0, hardware="gpu")
    finish(config("depth"), top1=81.0, ms=75.0, hardware="gpu")
    finish(config("depth"), top1=81.0, ms=90.0, backend="ddp", world_size="2")
    rows = {(row.method, row.backend, row.settings): row for row in compare(uri, "ssam_scale")}
    assert len(rows) == 4
    on_gpu = rows["ssam-depth", "single", "hardware gpu, world_size 1"]
    assert on_gpu.time_over_base == pytest.approx(1.5, rel=1e-12)
    alone = rows["ssam-depth", "ddp", "hardware cpu, world_size 2"]
    assert (alone.time_over_base, alone.saving_over_sam) == (None, None)
    assert alone.notes == (
        "no finished run of the base optimizer alone with resnet18, batch 64, 32 px, fp32, ddp on 2 process(es), "
        "on this hardware",
        "no finished run of dense SAM with resnet18, batch 64, 32 px, fp32, ddp on 2 process(es), on this hardware",
    )
    shown = text_of(list(rows.values()))
    assert "— [" in shown
    assert [line.split("│")[2].strip() for line in shown.splitlines() if "│ ssam-depth" in line] == ["ddp", "single"]
    assert "backend" not in text_of([on_gpu])  # the same everywhere
    assert "[1] no finished run of dense SAM" in shown


def test_of_several_bases_the_one_most_alike_is_taken(config: MakeConfig, uri: str, finish: Finish) -> None:
    def with_lr(made: Config, lr: float) -> Config:
        return made.model_copy(update={"optimizer": made.optimizer.model_copy(update={"lr": lr})})

    finish(with_lr(config("base"), 0.1), top1=80.0, ms=100.0)
    finish(with_lr(config("base"), 0.5), top1=80.0, ms=125.0)
    finish(with_lr(config("sam"), 0.1), top1=80.0, ms=250.0)
    sam = compare(uri, "ssam_scale")[-1]
    assert sam.time_over_base == pytest.approx(2.5, rel=1e-12)


def test_missing_metrics_are_dashes_with_a_note(config: MakeConfig, uri: str, finish: Finish) -> None:
    finish(config("base"))
    (row,) = compare(uri, "ssam_scale")
    assert (row.top1, row.step_seconds, row.time_over_base) == (None, None, None)
    assert row.notes == ("base: no step time was recorded",)
    assert "[1] base: no step time was recorded" in text_of([row])


def test_a_group_selects_runs(config: MakeConfig, uri: str, finish: Finish) -> None:
    finish(config("base", seed=0), top1=80.0, ms=100.0, group="monday")
    finish(config("base", seed=1), top1=90.0, ms=100.0, group="tuesday")
    (row,) = compare(uri, "ssam_scale", group="tuesday")
    assert (row.runs, row.top1) == (1, 90.0)
    with pytest.raises(UserError, match="group 'friday'; the experiment has 2 FINISHED"):
        compare(uri, "ssam_scale", group="friday")


def test_errors_say_what_would_work(config: MakeConfig, uri: str, finish: Finish, tmp_path: Any) -> None:
    with pytest.raises(UserError, match="did you mean 'Default'"):
        compare(uri, "ssam_scale")
    finish(config("base"), status="FAILED")
    with pytest.raises(UserError, match=r"no experiment 'ssam_scal' in sqlite.*did you mean 'ssam_scale'"):
        compare(uri, "ssam_scal")
    with pytest.raises(UserError, match="no finished run in experiment 'ssam_scale'; the experiment has 1 FAILED"):
        compare(uri, "ssam_scale")
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
    assert row == json.loads(json.dumps(compare(uri, "ssam_scale")[0].__dict__))


def test_address_of_a_server_is_its_own() -> None:
    assert interface_lines("http://me:pw@host:5000/", "7", "ab") == [
        "in the browser: http://me:***@host:5000/#/experiments/7/runs/ab"
    ]
    assert "me:***@host/db" in interface_lines("postgresql://me:pw@host/db", "7", "ab")[0]
    assert interface_lines("http://me:pw@host:5000/", "7") == [
        "In the browser: http://me:***@host:5000/#/experiments/7/" + QUERY
    ]

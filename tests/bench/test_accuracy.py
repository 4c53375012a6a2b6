"""`ssam-scale bench accuracy`: what a study runs, what it keeps when it is killed, and what it reports."""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ssam_scale.bench.accuracy.cells import Cell, Cells, survivors
from ssam_scale.bench.accuracy.report import recommendation, report
from ssam_scale.bench.accuracy.results import NAME, Results, alone
from ssam_scale.bench.accuracy.work import Work, estimate
from ssam_scale.config.study import LoadedStudy
from ssam_scale.data import inspect
from ssam_scale.data.loaders import draws
from ssam_scale.data.split import prepare_split
from ssam_scale.errors import UserError
from ssam_scale.tracking.compare.statistics import holm, paired
from ssam_scale.train.predict_flops import predictor, stage_flops
from tests.support.checkout import ROOT
from tests.support.images import make_image_folder
from tests.support.runs import CLASSES, RESNET, ssam_scale

STUDIES = ROOT / "benchmarks/studies"
SMALL: dict[str, Any] = {
    "title": "A few images",
    "recipe": {
        "model": RESNET,
        "data": {"batch_size": 12, "eval_batch_size": 8, "resolution": 32, "eval_resolution": 32},
        "optimizer": {"lr": 0.05},
        "train": {"epochs": 1},
    },
    "data": {"source": "folder", "train": 24, "tune": 16},
    "tuning": {"candidates": 2, "rungs": [{"seeds": 1}]},
    "seeds": {"each": 2, "finalists": 2},
    "methods": {
        "base": {"set": {"perturbation": None}},
        "sam": {"set": {"perturbation": {"rho": 0.05}}, "tune": {"perturbation.rho": [0.05, 0.1]}},
    },
}
LARGER = {
    **SMALL,
    "tuning": {"candidates": 5, "rungs": [{"seeds": 1}, {"seeds": 2}, {"seeds": 3, "epochs": 2}]},
    "seeds": {"each": 2, "finalists": 4, "count": 1},
    "methods": {
        **SMALL["methods"],
        "sam": {"set": {"perturbation": {"rho": 0.05}}, "tune": {"perturbation.rho": [0.01, 0.02, 0.05, 0.1, 0.2]}},
        "late": {
            "set": {"perturbation": {"rho": 0.05}},
            "tune": {"perturbation.window": [[k / 10, 1.0] for k in range(1, 6)]},
        },
        "eighth": {
            "set": {"perturbation": {"rho": 0.05, "direction": {"fraction": 0.125}}},
            "tune": {"perturbation.rho": [0.01, 0.02, 0.05, 0.1, 0.2]},
        },
    },
}


def load(folder: Path, values: Any, name: str = "small") -> LoadedStudy:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return LoadedStudy(path)


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> LoadedStudy:
    return load(tmp_path_factory.mktemp("larger"), LARGER)


def line_of(cell: Cell, key: str, top1: float | None, overhead: float | None = 1.5) -> dict[str, Any]:
    """As a run would leave it."""
    found: dict[str, Any] = {
        "key": key,
        "stage": cell.stage,
        "method": cell.method,
        "knobs": dict(cell.knobs or ()),
        "seed": cell.seed,
        "epochs": cell.epochs,
        "wall_seconds": 10.0 * cell.epochs,
        "top1": top1,
    }
    if top1 is None:
        return found
    over = {"overhead": overhead, "overhead_low": None, "overhead_high": None}
    if overhead is not None and overhead != 1.0:
        over |= {"overhead_low": overhead - 0.1, "overhead_high": overhead + 0.2}
    return {**found, **over, "seconds": 5.0, "commit": "abc", "hardware": "a CPU", "run_id": f"run {key}"}


def done(loaded: LoadedStudy, top1: Callable[[Cell], float | None], **options: Any) -> dict[str, dict[str, Any]]:
    """All lines of a study, each run's accuracy being what `top1` says; checks that what is left is done in order."""
    cells, lines = Cells(loaded), {}
    while left := [c for c in cells.all(lines, **options) if c.knobs is None or cells.key(c) not in lines]:
        cell = left[0]
        assert cell.knobs is not None, f"{cell.name} waits for nothing that comes before it"
        overhead = {"base": 1.0, "eighth": 1.1}.get(cell.method, 1.5)
        lines[cells.key(cell)] = line_of(cell, cells.key(cell), top1(cell), overhead)
    return lines


# ---------------------------------------------------------------------------------------------------------- which runs


@given(st.lists(st.sampled_from([-math.inf, 1.0, 2.0, 3.0, 4.0, 5.0]), min_size=1, max_size=20))
def test_the_better_half_goes_on(scores: list[float]) -> None:
    kept = survivors(scores)
    assert len(kept) == math.ceil(len(scores) / 2)
    assert kept == sorted(set(kept))
    for left_out in set(range(len(scores))) - set(kept):
        assert all((scores[index], -index) > (scores[left_out], -left_out) for index in kept)


@pytest.mark.slow
@settings(max_examples=15)
@given(st.data())
def test_tuning_finds_the_best_candidate_by_the_same_number_of_runs_whatever_they_come_to(
    larger: LoadedStudy, data: st.DataObject
) -> None:
    quality = {
        (name, json.dumps(knobs)): data.draw(st.integers(0, 50).map(float) | st.none())
        for name, method in larger.study.methods.items()
        for knobs in method.grid
    }
    lines = done(larger, lambda cell: quality[cell.method, json.dumps(cell.knobs)])
    cells = Cells(larger)
    runs: dict[str, list[tuple[int, int]]] = {}
    for line in lines.values():
        if line["stage"] == "tune":
            runs.setdefault(line["method"], []).append((line["seed"], line["epochs"]))
            assert line["seed"] >= 1000, "a seed that methods are compared by"
    # 5 candidates with a seed, 3 with one more, 2 with three of twice the epochs
    assert set(runs) == {"sam", "late", "eighth"}
    assert all(sorted(of) == sorted(runs["sam"]) and len(of) == 5 + 3 + 6 for of in runs.values())
    for name, method in larger.study.methods.items():
        chosen = cells.chosen(name, lines)
        of = [quality[name, json.dumps(knobs)] for knobs in method.grid]
        best = max((q for q in of if q is not None), default=None)
        assert quality[name, json.dumps(chosen)] == best
    # Every plan that can be compared has its seeds; base, sam and one finalist within 1.2 have more.
    finals = {name: len(cells.finals(name, lines)) for name in larger.study.methods}
    finalist = quality["eighth", json.dumps(cells.chosen("eighth", lines))] is not None
    assert finals == {"base": 4, "sam": 4, "late": 2, "eighth": 4 if finalist else 2}


def test_base_and_sam_come_first_and_all_methods_are_compared_by_a_seed_before_the_next(larger: LoadedStudy) -> None:
    lines = list(done(larger, lambda cell: 50.0).values())
    first = [line["method"] in ("base", "sam") for line in lines]
    assert first[: 14 + 4] == [True] * 18
    others = [(line["seed"], line["method"]) for line in lines[18:] if line["stage"] == "final"]
    assert others[:4] == [(0, "late"), (0, "eighth"), (1, "late"), (1, "eighth")]
    tuned = [line["method"] for line in lines[18:] if line["stage"] == "tune"]
    assert tuned[:10] == ["late"] * 5 + ["eighth"] * 5
    assert tuned[10:16] == ["late"] * 3 + ["eighth"] * 3
    assert [(line["seed"], line["method"]) for line in lines[-6:]] == [
        (seed, name) for seed in (2, 3) for name in ("base", "sam", "eighth")
    ]


def test_fewer_seeds_and_one_method(larger: LoadedStudy, tmp_path: Path) -> None:
    lines = done(larger, lambda cell: 50.0, seeds=1)
    assert {line["seed"] for line in lines.values() if line["stage"] == "final"} == {0}
    left = Work(larger, tmp_path, only=["late"]).left()
    assert {cell.method for cell in left} == {"late"}
    assert len(left) == 5 + 3 + 6 + 2
    with pytest.raises(UserError, match=r"--only 'sma' is no method of the study; there are base, sam, late, eighth"):
        Work(larger, tmp_path, only=["sma"])


def test_a_run_counts_as_long_as_it_is_made_from_the_same(tmp_path: Path) -> None:
    """Adding a method, seeds or a tuning round changes nothing of what is done; another learning rate changes all."""

    def keys(values: Any) -> dict[str, str]:
        loaded = load(tmp_path, values)
        cells = Cells(loaded)
        return {cell.name: cells.key(cell) for cell in cells.all({}) if cell.knobs is not None}

    before = keys(SMALL)
    assert keys(LARGER).items() >= before.items()
    values = copy.deepcopy(SMALL)
    values["recipe"]["optimizer"]["lr"] = 0.06
    assert not set(keys(values).values()) & set(before.values())
    values = copy.deepcopy(SMALL)
    values["methods"]["sam"]["set"]["perturbation"]["norm"] = "dense"
    after = keys(values)
    assert [name for name in before if after[name] != before[name]] == [n for n in before if "sam" in n]


def test_how_long_it_takes(larger: LoadedStudy) -> None:
    cell = Cell("final", "late", (), 0, 4)
    assert estimate([cell], {}) is None
    lines = {
        str(n): {"stage": s, "method": m, "wall_seconds": w, "epochs": 2}
        for n, (s, m, w) in enumerate(
            [("final", "late", 10.0), ("final", "late", 14.0), ("tune", "late", 8.0), ("tune", "sam", 2.0)]
        )
    }
    assert estimate([cell], lines) == pytest.approx(6.0 * 4)
    assert estimate([Cell("final", "sam", (), 0, 4)], lines) == pytest.approx(1.0 * 4)
    assert estimate([Cell("final", "base", (), 0, 4)] * 2, lines) == pytest.approx(2 * 4 * (10 + 14 + 8 + 2) / 8)


# ------------------------------------------------------------------------------------------------------------- results


def test_a_line_that_was_not_written_to_its_end_is_done_again(tmp_path: Path) -> None:
    results = Results(tmp_path)
    for number in range(3):
        results.append({"key": f"run {number}", "top1": number / 3})
    whole = results.path.read_bytes()
    for cut in range(1, len(whole) + 1):
        results.path.write_bytes(whole[:cut])
        again = Results(tmp_path)
        assert len(again.lines) == whole[:cut].count(b"\n")
        for number in range(3):
            if f"run {number}" not in again.lines:
                again.append({"key": f"run {number}", "top1": number / 3})
        assert results.path.read_bytes() == whole


def test_a_line_of_something_else_is_told(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text('{"key": "a"}\nnothing\n{"key": "b"}\n')
    with pytest.raises(UserError, match=rf"{NAME}:2: not a line that `ssam-scale bench accuracy` has written"):
        Results(tmp_path)


def test_one_command_at_a_time_works_on_a_study(tmp_path: Path) -> None:
    again = pytest.raises(UserError, match="another `ssam-scale bench accuracy` is at work there")
    with alone(tmp_path), again, alone(tmp_path):
        pass
    with alone(tmp_path):
        pass


def test_a_method_that_fails_does_not_hold_the_others_up(larger: LoadedStudy, tmp_path: Path) -> None:
    said: list[str] = []

    def run(cell: Cell, key: str) -> dict[str, object]:
        if cell.method == "late":
            raise UserError(f"{cell.name}: it broke")
        return line_of(cell, key, 50.0)

    work = Work(larger, tmp_path)
    with pytest.raises(UserError, match=r"late.*it broke$"):
        work.do(run, said.append)
    assert {cell.method for cell in work.left()} == {"late", ""}, "who is a finalist is not known without it"
    assert sum("failed, and late is left for the next time" in line for line in said) == 1
    assert said[-1].endswith("left")


# ------------------------------------------------------------------------------------------------------------- studies


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.yaml")), ids=lambda p: p.stem)
def test_the_studies_that_are_there(path: Path) -> None:
    """Those whose plans we recommend have ten seeds for what is left; one of a single key need not."""
    loaded = LoadedStudy(path)
    assert loaded.study.seeds.each >= 5
    if loaded.study.seeds.count:
        assert loaded.study.seeds.finalists >= 10
        assert len(Cells(loaded).all({})) > 100
    perturbed = [loaded.config(name, method.grid[0]) for name, method in loaded.study.methods.items()]
    assert len({config.model_dump_json() for config in perturbed}) == len(perturbed), "two methods are the same"


MISTAKES = [
    ({"tittle": "x"}, r"tittle: unknown key; did you mean title\?"),
    ({"data": {"source": "imagenet", "train": 1, "tune": 1}}, r"data.source: must be fashion-mnist or folder"),
    ({"data": {"source": "folder", "train": 0, "tune": 1}}, r"data.train: must be greater than or equal to 1, given 0"),
    ({"recipe": None}, "needs either config, the file of a run's configuration, or recipe, its sections"),
    ({"recipe": None, "config": "none.yaml"}, r"config: .*none.yaml: no such file"),
    ({"seeds": {"each": 5, "finalists": 4}}, "finalists: 4 are fewer than each, 5"),
    ({"seeds": {"each": 1, "finalists": 4}}, r"seeds.each: must be greater than or equal to 2, given 1"),
    ({"overrides": {"optimizer.lrr": 1}}, r"optimizer.lrr: unknown key; did you mean optimizer.lr\?"),
    ({"methods": {"base": {}}}, "needs base and sam, .* sam is missing"),
    ({"methods.base": {"set": {}}, "overrides": {"perturbation.rho": 0.1}}, r"methods.base: has a perturbation"),
    ({"methods.sam": {"set": {"perturbation": {"rho": 0.1, "interval": 2}}}}, "methods.sam: is not dense SAM"),
    ({"methods.new": {"sett": {}}}, r"methods.new.sett: unknown key; did you mean methods.new.set\?"),
    ({"methods.new": "sam"}, r"methods.new: must be a section with keys of its own, given \"sam\""),
    (
        {"methods.new": {"set": {"perturbation.rhoo": 1}}},
        r"\d+: methods.new: override perturbation.rhoo=1: .*did you mean perturbation.rho\?",
    ),
    (
        {"methods.new": {"set": {"perturbation": {"rho": -1}}}},
        r"methods.new: .*perturbation.rho: must be greater than 0",
    ),
    ({"methods.new": {"set": {"train.epochs": 9}}}, "train.epochs is the study's, the same for every method"),
    (
        {
            "recipe.train": {"epochs": 4},
            "tuning": {"candidates": 2, "rungs": [{"seeds": 1, "epochs": 1}]},
            "methods.new": {"set": {"trajectory": {"kind": "mesa", "start_epoch": 2}}},
        },
        r"methods.new: .*start_epoch 2 must be less than train.epochs 1, .* \(tuning.rungs has one of 1\)",
    ),
    ({"methods.new": {"set": {"data": {}}}}, "data is the study's"),
    ({"methods.new": {"set": {"data.batch_size": 4}}}, "data.batch_size is the study's, the same for every method"),
    (
        {"methods.new": {"tune": {"perturbation.rho": [0.1]}}},
        "methods.new.tune: has 1 candidates, and .* is 2: .*budget",
    ),
    (
        {"methods.new": {"tune": {f"perturbation.{k}": [1, 2] for k in ("rho", "interval", "reuse")}}},
        "perturbation.rho, perturbation.interval, perturbation.reuse: at most 2 knobs are tuned",
    ),
    ({"methods.new": {"tune": {"perturbation.rho": []}}}, "perturbation.rho has no values"),
    ({"methods.a b": {}}, '"a b" is not a name of letters, digits, dots and dashes'),
    ({"tuning": {"candidates": 2, "rungs": []}}, r"tuning.rungs"),
    (
        {"tuning": {"candidates": 2, "rungs": [{"seed": 1}]}},
        r"tuning.rungs.0.seed: .*did you mean tuning.rungs.0.seeds",
    ),
]


@pytest.mark.parametrize(("change", "message"), MISTAKES, ids=[str(change)[:60] for change, _ in MISTAKES])
def test_a_mistake_in_a_study_is_one_line(
    change: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = copy.deepcopy(SMALL)
    for key, value in change.items():
        section, _, name = key.partition(".")
        if name:
            values[section][name] = value
        else:
            values[section] = value
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    assert ssam_scale("bench", "accuracy", path, "--folder", tmp_path / "work", "--dry-run") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert re.search(message, said), said
    assert str(path) in said
    assert not (tmp_path / "work").exists()


def test_mistakes_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = load(tmp_path, SMALL)._path
    for arguments, message in (
        ([tmp_path / "none.yaml"], "none.yaml: no such file; the nearest in .* is small.yaml"),
        ([path, "--seeds", "0"], "--seeds is 0"),
        ([path, "--folder", tmp_path / "work"], "--data is missing: a folder with train/ and val/"),
        ([path, "--folder", tmp_path / "work", "--data", tmp_path], "--data .*: has no folder val or test; expected"),
        ([path, "--folder", tmp_path / "work", "--report"], "work: no run of small has finished there"),
        ([path, "--folder", path], "--folder .*small.yaml is not a folder"),
        ([path, "--record", tmp_path / "none"], "--record is .*none, which is not a folder"),
    ):
        assert ssam_scale("bench", "accuracy", *arguments) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert re.search(message, said), said


def test_a_dry_run_lists_what_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loaded = load(tmp_path, SMALL)
    options = ["bench", "accuracy", loaded._path, "--folder", tmp_path / "work", "--dry-run"]
    assert ssam_scale(*options) == 0
    *runs, last = capsys.readouterr().out.splitlines()
    assert runs[0] == "tune: sam, rho=0.05, 1 epochs, seed 1000"
    assert runs[-1] == "final: sam, to be chosen, 1 epochs, seed 1"
    assert last == "6 runs, how long it takes is not known yet; 0 are done"
    (tmp_path / "work").mkdir()
    for line in itertools.islice(done(loaded, lambda cell: 50.0).values(), 3):
        Results(tmp_path / "work").append(line)
    assert ssam_scale(*options) == 0
    *runs, last = capsys.readouterr().out.splitlines()
    assert runs == [f"final: sam, rho=0.05, 1 epochs, seed {seed}" for seed in (0,)] + [
        f"final: {name}, {knobs}, 1 epochs, seed 1" for name, knobs in (("base", "as set"), ("sam", "rho=0.05"))
    ]
    assert last == "3 runs, about 0 min left; 3 are done"


# -------------------------------------------------------------------------------------------------------------- images


@given(st.integers(1, 200), st.data())
def test_draws_are_disjoint(images: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, images))
    second = data.draw(st.integers(0, images - first))
    one, other = draws(images, first, second)
    assert (len(one), len(other)) == (first, second)
    assert len({*one, *other}) == first + second
    assert all(0 <= index < images for index in (*one, *other))
    assert np.array_equal(one, np.sort(one))
    assert np.array_equal(one, draws(images, first)[0]), "what data.subset trains on"


def test_the_files_of_a_study(tmp_path: Path) -> None:
    """Training, tuning and validation images are the originals' pixels, and no image is in two files."""
    for name, count, seed in (("train", 12, 0), ("test", 4, 1)):
        make_image_folder(tmp_path / "images" / name, CLASSES, count, (24, 30), seed)
    options: dict[str, Any] = {"train": 20, "tune": 15, "val": None, "progress": False}
    split = prepare_split(tmp_path / "out", "folder", tmp_path / "images", **options)
    files = [split.train, split.tune, split.val]
    found = [inspect(file) for file in files]
    assert [beton.images for beton in found] == [20, 15, 4 * CLASSES]
    assert all(beton.jpegs == 0 and beton.classes == CLASSES for beton in found)
    every = np.repeat(np.arange(CLASSES), 12)
    one, other = draws(12 * CLASSES, 20, 15)
    assert np.array_equal(found[0].labels, every[one])
    assert np.array_equal(found[1].labels, every[other])
    written = [file.stat().st_mtime_ns for file in files]
    # They are there: the folder is no longer needed.
    assert prepare_split(tmp_path / "out", "folder", None, **options) == split
    assert [file.stat().st_mtime_ns for file in files] == written
    with pytest.raises(UserError, match="has 48 training images, and 40 to train on and 9 to tune by are asked for"):
        prepare_split(tmp_path / "few", "folder", tmp_path / "images", train=40, tune=9, val=None, progress=False)
    with pytest.raises(UserError, match="has 16 validation images, and 17 are asked for"):
        prepare_split(tmp_path / "few", "folder", tmp_path / "images", train=1, tune=1, val=17, progress=False)


# -------------------------------------------------------------------------------------------------------------- report

TOP1 = st.integers(0, 10000).map(lambda hundredths: hundredths / 100)


@given(st.lists(st.tuples(TOP1, TOP1), min_size=2, max_size=12))
def test_paired_differences_are_scipys(pairs: list[tuple[float, float]]) -> None:
    first, second = zip(*pairs, strict=True)
    found = paired(first, second)
    assert found.mean == pytest.approx(np.mean(first) - np.mean(second), abs=1e-9)
    if len({round(one - other, 6) for one, other in pairs}) == 1:
        assert (found.low, found.high, found.p) == (None, None, None)
        return
    theirs = scipy.stats.ttest_rel(first, second)
    assert found.p == pytest.approx(theirs.pvalue, rel=1e-6)
    bounds = theirs.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((bounds.low, bounds.high), rel=1e-6, abs=1e-9)


ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "top1": st.integers(0, 30).map(float),
            "overhead": st.sampled_from([1.0, 1.05, 1.1, 1.2, 1.21, 1.5, None]),
            "p_holm": st.sampled_from([0.001, 0.049, 0.05, 0.5, None]),
            "diverged": st.sampled_from([0, 0, 0, 1]),
        }
    ),
    max_size=8,
)


@given(ROWS)
def test_the_rule_of_the_recommendation(drawn: list[dict[str, Any]]) -> None:
    rows = [
        {"method": f"m{n}", "knobs_in_words": "", "seeds": 5, "top1_sd": 1.0, "over_sam": row["top1"] - 15.0, **row}
        for n, row in enumerate(drawn)
    ]
    recommended, cheapest, said = recommendation(rows, 1.2)
    good = [
        row
        for row in rows
        if None not in (row["overhead"], row["p_holm"])
        and not row["diverged"]
        and not (row["over_sam"] < 0 and row["p_holm"] < 0.05)
    ]
    cheap = [row for row in good if row["overhead"] <= 1.2]
    by_name = {row["method"]: row for row in rows}
    if not cheap:
        assert (recommended, cheapest) == (None, None)
        assert said[0].startswith(("Recommended: none", "Recommended: nothing yet"))
        return
    assert recommended in {row["method"] for row in cheap}
    assert by_name[str(recommended)]["top1"] == max(row["top1"] for row in cheap)
    assert cheapest in {row["method"] for row in good}
    assert by_name[str(cheapest)]["overhead"] == min(row["overhead"] for row in good)


def test_a_report_says_what_its_lines_say(larger: LoadedStudy) -> None:
    """Against numbers that numpy and scipy make of the same accuracies."""
    tops = {
        "base": [80.0, 80.5, 79.8, 80.2],
        "sam": [81.2, 81.6, 81.1, 81.5],
        "late": [79.9, 80.4],
        "eighth": [81.3, 81.5, 81.3, 81.4],
    }
    best = {"sam": 0.1, "late": [0.3, 1.0], "eighth": 0.2}

    def top1(cell: Cell) -> float:
        if cell.stage == "final":
            return tops[cell.method][cell.seed]
        return 70.0 if dict(cell.knobs or ()).popitem()[1] == best[cell.method] else 60.0

    lines = done(larger, top1)
    found = report(larger, lines, lambda method, knobs: {"a network": 1.0 + len(knobs)})
    rows = {row["method"]: row for row in found.rows}
    assert list(rows) == ["base", "sam", "late", "eighth"]
    p_values = {}
    for name, of in tops.items():
        row = rows[name]
        assert (row["seeds"], row["pairs"]) == (len(of), 0 if name == "sam" else len(of))
        assert row["top1"] == pytest.approx(np.mean(of))
        assert row["top1_sd"] == pytest.approx(np.std(of, ddof=1))
        assert row["predicted"] == {"a network": 1.0 if name == "base" else 2.0}
        assert row["overhead"] == pytest.approx({"base": 1.0, "eighth": 1.1}.get(name, 1.5))
        if name == "base":
            assert row["overhead_interval"] is None
        else:
            assert row["overhead_interval"] == pytest.approx((row["overhead"] - 0.1, row["overhead"] + 0.2))
            assert row["knobs_in_words"].endswith(f"={best[name]}".replace(" ", ""))
            assert len(row["tuned"]) == 5
            assert max(row["tuned"], key=lambda each: np.mean(each["top1"]))["knobs"] == row["knobs"]
        if name != "sam":
            theirs = tops["sam"][: len(of)]
            p_values[name] = scipy.stats.ttest_rel(of, theirs).pvalue
            assert row["over_sam"] == pytest.approx(np.mean(of) - np.mean(theirs))
            assert row["p"] == pytest.approx(p_values[name])
    for name, p in zip(p_values, holm(list(p_values.values())), strict=True):
        assert rows[name]["p_holm"] == pytest.approx(p)
    assert rows["sam"]["p"] is rows["sam"]["over_sam"] is None
    assert found.counts is True
    assert (found.recommended, found.cheapest) == ("eighth", "eighth")
    text = "\n".join(found.said)
    assert "The setting counts: dense SAM gains +1.22 over base" in text
    assert "Recommended: eighth (rho=0.2; 81.38 ± 0.10, 1.100 × base)" in text
    assert "A trial: some methods have 2 seeds only" in text
    assert found.picture is not None
    assert found.picture.svg.count("eighth") == 1
    assert "eighth 81.38% at +10%" in found.picture.alternative


def test_a_report_of_what_is_there_so_far(larger: LoadedStudy) -> None:
    lines = done(larger, lambda cell: None if cell.method == "late" else 50.0 + cell.seed % 3)
    for count in (*range(0, len(lines), 7), len(lines)):
        found = report(larger, dict(itertools.islice(lines.items(), count)))
        assert [row["method"] for row in found.rows] == ["base", "sam", "late", "eighth"]
    assert "Without a result so far: late." in found.said
    assert any(
        sentence.startswith("Runs whose loss became infinite") and "late (2)" in sentence for sentence in found.said
    )
    assert found.counts is False


@pytest.mark.slow
def test_the_report_on_disk(
    larger: LoadedStudy, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ssam_scale.cli.bench._LARGE", {"resnet50": "test_resnet"})
    monkeypatch.setattr("ssam_scale.train.predict_flops._SIDE", 32)
    place, into = tmp_path / "work", tmp_path / "results"
    place.mkdir()
    into.mkdir()
    results = Results(place)
    for line in done(larger, lambda cell: 50.0 + (7 * cell.seed + len(cell.method)) % 5).values():
        results.append(line)
    options = ["bench", "accuracy", larger._path, "--folder", place, "--report", "--record", into]
    assert ssam_scale(*options) == 0
    printed = capsys.readouterr().out
    names = sorted(path.suffix for path in into.iterdir())
    assert names == [".json", ".md", ".svg"]
    text = next(into.glob("accuracy-small_*.md")).read_text()
    stored = json.loads(next(into.glob("*.json")).read_text())
    assert [row["method"] for row in stored["rows"]] == ["base", "sam", "late", "eighth"]
    assert stored["rows"][0]["top1_by_seed"].keys() == {"0", "1", "2", "3"}
    assert stored["rows"][3]["predicted"] == {"resnet50": pytest.approx(1.125, abs=1e-9)}
    assert "| sam | rho=0.01 | 4 |" in text
    assert "2.000" in text.split("| sam |")[1].split("\n")[0]
    assert next(into.glob("*.svg")).name in text
    assert "Recommended: " in text
    assert "Recommended: " in printed
    tuned = next(line for line in text.splitlines() if line.startswith("- eighth: "))
    assert len(re.findall(r"rho=[\d.]+ \d\d\.\d\d \(\d\)", tuned)) == 5
    assert tuned.split(",")[0].endswith("(3)"), "the chosen one was in the last round"
    svg = next(into.glob("*.svg")).read_text()
    assert svg.startswith("<?xml")
    assert "http://" not in svg.replace("http://www.w3.org/", "").replace("http://purl.org/", "").replace(
        "http://creativecommons.org/", ""
    )
    assert ssam_scale(*options, "--json") == 0
    assert [row["method"] for row in json.loads(capsys.readouterr().out)] == ["base", "sam", "late", "eighth"]


def test_arithmetic_of_plans(tmp_path: Path) -> None:
    values = copy.deepcopy(SMALL)
    for name, section in (
        ("eighth", {"direction": {"fraction": 0.125}}),
        ("interval", {"interval": 10}),
        ("late", {"window": [0.75, 1.0]}),
        ("cut", {"mask": {"pattern": "depth", "policy": "fixed", "cut": 0.5}}),
        ("nm", {"mask": {"pattern": "nm", "n": 1, "m": 7}}),
    ):
        values["methods"][name] = {"set": {"perturbation": {"rho": 0.1, **section}}}
    mesa = {"kind": "mesa", "start_epoch": 0}
    values["methods"]["mesa"] = {"set": {"perturbation": None, "trajectory": mesa}}
    predict = predictor(load(tmp_path, values), {"it": "test_resnet"})
    found = {name: predict(name, ())["it"] for name in values["methods"]}
    assert 1.3 < (found.pop("mesa") or 0.0) < 1.5, "a forward, which is a third of a step and more"
    assert found["nm"] is None, "this network has no groups of 7"
    exact = {"base": 1.0, "sam": 2.0, "eighth": 1.125, "interval": 1.1, "late": 1.25}
    assert {name: found[name] for name in exact} == pytest.approx(exact)
    assert found["cut"] is not None
    assert 1.05 < found["cut"] < 2.0


def test_flops_of_a_stage_are_those_of_its_products() -> None:
    from ssam_scale.perturbation.staged_model import Stage, StagedModel

    model = torch.nn.Sequential(torch.nn.Linear(8, 16, bias=False), torch.nn.Linear(16, 4, bias=False))
    stages = [Stage(f"{i}", layer, layer) for i, layer in enumerate(model)]
    times = stage_flops(StagedModel(model, stages), torch.empty(3, 8, device="meta"))
    for stage, product in zip(times.stages, (2 * 3 * 8 * 16, 2 * 3 * 16 * 4), strict=True):
        assert (stage.forward, stage.backward) == (product, 2 * product)
        assert stage.no_weights == stage.no_input == product


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("transposed", [False, True])
def test_flops_of_convolutions_in_groups_are_those_of_their_groups(groups: int, transposed: bool) -> None:
    from ssam_scale.perturbation.staged_model import Stage, StagedModel

    cls = torch.nn.ConvTranspose2d if transposed else torch.nn.Conv2d
    layer = cls(8, 16, 1, groups=groups)
    images = torch.empty(3, 8, 6, 6, device="meta")
    [stage] = stage_flops(StagedModel(torch.nn.Sequential(layer), [Stage("0", layer, layer)]), images).stages
    product = 2 * 3 * 36 * 8 * 16 // groups
    assert (stage.forward, stage.backward) == (product, 2 * product)
    assert stage.no_weights == stage.no_input == product


# ---------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a small study was done from its beginning to its end."""
    home = tmp_path_factory.mktemp("trained")
    for name, count, seed in (("train", 12, 0), ("val", 5, 1)):
        make_image_folder(home / "images" / name, CLASSES, count, (36, 40), seed)
    load(home, SMALL)
    done = command(home, "work")
    assert done.returncode == 0, done.stderr
    return home


def arguments(home: Path, work: str, *options: str) -> list[str]:
    line = [sys.executable, "-m", "ssam_scale", "bench", "accuracy", str(home / "small.yaml"), "--data"]
    return [*line, str(home / "images"), "--folder", str(home / work), "--seeds", "1", *options]


def command(home: Path, work: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments(home, work, *options), capture_output=True, text=True, timeout=600, cwd=home)


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / NAME).read_text().splitlines()]


@pytest.mark.slow
def test_a_study_from_beginning_to_end(trained: Path) -> None:
    """Four real trainings, which take ten seconds each, mostly to start."""
    lines = lines_of(trained / "work")
    assert [(line["stage"], line["method"], line["seed"]) for line in lines] == [
        ("tune", "sam", 1000),
        ("tune", "sam", 1000),
        ("final", "base", 0),
        ("final", "sam", 0),
    ]
    for line in lines:
        assert 0.0 <= line["top1"] <= 100.0
        assert line["wall_seconds"] > line["seconds"] > 0.0
        assert line["versions"].keys() >= {"torch", "timm", "python"}
        assert line["hardware"]
        assert len(line["run_id"]) == 32
        probed = line["stage"] == "final" and line["method"] == "sam"
        assert (line["overhead"] is not None) == (line["stage"] == "final")
        if probed:
            assert line["overhead"] > 0.0
    assert not list((trained / "work/running").iterdir())
    text = (trained / "work/report.md").read_text()
    assert "| base | as set | 1 |" in text
    assert (trained / "work/report.svg").exists()


@pytest.mark.slow
def test_killed_in_the_middle_it_goes_on_and_comes_to_the_same(trained: Path) -> None:
    """Three real trainings, which take ten seconds each, mostly to start."""
    again, whole = trained / "again", lines_of(trained / "work")
    shutil.copytree(trained / "work", again)
    # Two runs are done, and of a third line half was written.
    text = (again / NAME).read_text().splitlines(keepends=True)
    (again / NAME).write_text("".join(text[:2]) + text[2][:40])
    with subprocess.Popen(
        arguments(trained, "again"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=trained
    ) as process:
        ended = time.monotonic() + 300
        while (again / NAME).read_text().count("\n") < 3:
            assert process.poll() is None
            assert time.monotonic() < ended
            time.sleep(0.1)
        # In the next run, whose process is its child.
        while not (children := children_of(process.pid)):
            assert time.monotonic() < ended
            time.sleep(0.05)
        time.sleep(1.0)
        os.kill(process.pid, signal.SIGKILL)
    while any(alive(child) for child in children):
        assert time.monotonic() < ended, "the run goes on without the command"
        time.sleep(0.05)
    assert len(lines_of(again)) == 3
    finished = command(trained, "again")
    assert finished.returncode == 0, finished.stderr
    compared = ("key", "stage", "method", "knobs", "seed", "epochs", "top1", "hardware", "versions")
    for one, other in zip(whole, lines_of(again), strict=True):
        assert {key: one[key] for key in compared} == {key: other[key] for key in compared}
    assert not list((again / "running").iterdir())


@pytest.mark.exhaustive
def test_a_run_that_diverges_is_a_result_and_one_that_fails_is_not(trained: Path) -> None:
    """Two real trainings, which take ten seconds each, mostly to start."""
    values = copy.deepcopy(SMALL)
    values["methods"] |= {
        # Each step multiplies the weights by a million.
        "far": {"set": {"perturbation": {"rho": 1.0}, "optimizer": {"lr": 1000.0, "weight_decay": 1000.0}}},
        # One image in an ascent of 12 is fewer than BatchNorm takes.
        "one": {"set": {"perturbation": {"rho": 0.1, "direction": {"fraction": 0.01}}}},
    }
    values["recipe"]["train"] = {"epochs": 8}
    home = trained
    (home / "small.yaml").rename(home / "kept.yaml")
    try:
        load(home, values)
        found = command(home, "work", "--only", "far", "--only", "one")
    finally:
        (home / "kept.yaml").replace(home / "small.yaml")
    assert found.returncode == 2
    last = found.stderr.strip().splitlines()[-1]
    assert "final: one, as set, 8 epochs, seed 0: exit code 2" in last
    assert "BatchNorm" in last
    by_method = {line["method"]: line for line in lines_of(home / "work")}
    assert by_method["far"]["top1"] is None
    assert by_method["far"]["error"].startswith("the loss became")
    assert "one" not in by_method


def children_of(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"

"""A sweep's runs: methods times points times seeds, each a configuration; every mistake in the first second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ssam_scale.config.load import load
from ssam_scale.config.presets import PRESETS, TERMS
from ssam_scale.config.sweep import LoadedSweep, Sweep
from ssam_scale.errors import UserError
from tests.support.configs import SMALL


@pytest.fixture
def sweep(tmp_path: Path) -> Any:
    """Loads a sweep of the small configuration with these keys."""
    (tmp_path / "run.yaml").write_text(SMALL)

    def load_it(**keys: Any) -> LoadedSweep:
        path = tmp_path / "radius.yaml"
        path.write_text(yaml.safe_dump({"config": "run.yaml", **keys}, sort_keys=False))
        return LoadedSweep(path)

    return load_it


def test_methods_times_grid_times_seeds(sweep: Any, tmp_path: Path) -> None:
    """Seed by seed; a method without a perturbation has no radius, and is trained once a seed."""
    loaded = sweep(
        methods=["base", "config", "ssam-f"],
        grid={"perturbation.rho": [0.1, 0.2], "optimizer.lr": [1, 2]},
        seeds=[5, 3],
        overrides={"train.epochs": 7},
    )
    assert [run.name for run in loaded.runs] == [
        f"{point}-seed-{seed}"
        for seed in (5, 3)
        for point in (
            *(f"base-lr={lr}" for lr in (1, 2)),
            *(f"{method}-rho={rho}-lr={lr}" for method in ("config", "ssam-f") for rho in (0.1, 0.2) for lr in (1, 2)),
        )
    ]
    by_name = {run.name: loaded.config(run) for run in loaded.runs}
    alone = load(tmp_path / "run.yaml", ["train.epochs=7", "optimizer.lr=2", "train.seed=3", "checkpoint.resume=auto"])
    own = {"tracking": alone.tracking, "checkpoint": alone.checkpoint}
    base = by_name["base-lr=2-seed-3"]
    assert base.perturbation is None
    assert base.model_copy(update={**own, "perturbation": alone.perturbation}) == alone
    plain = by_name["config-rho=0.2-lr=2-seed-3"]
    assert plain.model_copy(update=own) == alone
    assert plain.checkpoint.directory == Path("checkpoints/radius/config-rho=0.2-lr=2-seed-3")
    assert (plain.tracking.group, plain.tracking.run_name) == ("radius", "config rho=0.2 lr=2 seed 3")
    assert by_name["ssam-f-rho=0.1-lr=1-seed-5"].perturbation.mask.score == "fisher"
    assert by_name["ssam-f-rho=0.1-lr=1-seed-5"].perturbation.rho == 0.1


@pytest.mark.parametrize("method", ["config", "base", *PRESETS, *TERMS])
def test_every_named_method_can_be_swept(sweep: Any, method: str) -> None:
    (run,) = sweep(methods=[method], overrides={"train.epochs": 20}).runs
    assert run.title == f"{method} seed 0"


def test_methods_of_ones_own(sweep: Any) -> None:
    loaded = sweep(
        methods={
            "late": {"perturbation.window": [0.5, 1.0]},
            "sam": None,
            "wide": {"model": {"name": "resnet50", "num_classes": 10}},
        }
    )
    late, sam, wide = (loaded.config(run) for run in loaded.runs)
    assert late.perturbation.window == (0.5, 1.0)
    assert late.perturbation.mask == wide.perturbation.mask != sam.perturbation.mask
    assert wide.model.name == "resnet50"


def test_points_one_by_one(sweep: Any) -> None:
    loaded = sweep(points=[{"optimizer.lr": 0.1}, {"optimizer.lr": 0.2, "perturbation.rho": 0.3}])
    assert [run.name for run in loaded.runs] == ["config-lr=0.1-seed-0", "config-lr=0.2-rho=0.3-seed-0"]


def test_draws_are_the_same_for_each_method_and_each_time(sweep: Any) -> None:
    values = {
        "optimizer.lr": {"low": 0.001, "high": 1.0, "log": True},
        "optimizer.weight_decay": {"low": 0.0, "high": 1.0},
        "train.epochs": {"low": 3, "high": 5},
        "optimizer.name": ["sgd", "lamb"],
    }
    runs = sweep(methods=["base", "sam"], random={"draws": 20, "values": values}).runs
    base, sam = ([run.knobs for run in runs if run.method == method] for method in ("base", "sam"))
    assert base == sam == [run.knobs for run in sweep(random={"draws": 20, "values": values}).runs]
    assert base != [run.knobs for run in sweep(random={"draws": 20, "seed": 1, "values": values}).runs]
    lr, decay, epochs, name = zip(*([value for _, value in knobs] for knobs in base), strict=True)
    assert all(0.001 <= each <= 1.0 for each in lr)
    assert 5 <= sum(each < 0.0316 for each in lr) <= 15  # by logarithms; half of twenty within two deviations
    assert all(0.0 <= each <= 1.0 for each in decay)
    assert set(epochs) == {3, 4, 5}
    assert set(name) == {"sgd", "lamb"}


VALUES = st.one_of(st.integers(0, 10**6), st.text("a/ .=é\n", max_size=130), st.lists(st.integers(0, 3), max_size=3))


@given(values=st.lists(VALUES, min_size=1, max_size=8, unique_by=repr))
def test_every_run_has_a_folder_of_its_own(values: list[Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    """Whatever is tried: a name that any disk takes, without a separator."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "run.yaml").write_text(SMALL)
    keys = {"config": "run.yaml", "grid": {"model.kwargs": [{"x": value} for value in values]}, "seeds": [0, 1]}
    (folder / "s.yaml").write_text(yaml.safe_dump(keys))
    names = [run.name for run in LoadedSweep(folder / "s.yaml").runs]
    assert len(set(names)) == len(names) == 2 * len(values)
    for name in names:
        (folder / "all" / name).mkdir(parents=True)
    assert len(list((folder / "all").iterdir())) == len(names)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grid: {perturbation.roh: [1]}", "config: roh=1: s.yaml:2: perturbation.roh: unknown key; did you mean"),
        ("grid: {optimizer.lr: [0.1, -1]}", "config: lr=-1: s.yaml:2: optimizer.lr: must be greater than 0, given -1"),
        ("grid: {optimizer.lr: []}", "s.yaml:2: grid: optimizer.lr has no values"),
        ("grid: {optimizer.lr: 0.1}", "s.yaml:2: grid.optimizer.lr: must be a list, given 0.1"),
        ("grid: {perturbation: [{preset: sam, window: [0.5, 1]}]}", ": s.yaml:2: perturbation.preset sam has window"),
        (
            "methods: [sam]\ngrid: {perturbation.window: [[0.5, 1]]}",
            ": s.yaml:2, s.yaml:3: perturbation.preset sam has",
        ),
        ("points: [{nothing: 1}]", "config: nothing=1: s.yaml:2: nothing: unknown key"),
        ("overrides: {train.epoch: 3}", "s.yaml:2: train.epoch: unknown key; did you mean train.epochs?"),
        ("methods: [sma]", "s.yaml:2: methods: there is no method sma; did you mean sam?"),
        ("methods: [sam, sam]", "s.yaml:2: methods: sam is there twice"),
        ("methods: [a/b]", 's.yaml:2: methods: "a/b" is not a name'),
        ("methods: []", "s.yaml:2: methods: there is none"),
        ("methods: {mine: null}", "s.yaml:2: methods: there is no method mine"),
        ("methods: {mine: {perturbation.roh: 1}}", "mine: s.yaml:2: perturbation.roh: unknown key"),
        ("methods: {mine: {train.seed: 1}}", "s.yaml:2: methods: train.seed: a sweep sets train.seed itself, by seeds"),
        ("overrides: {checkpoint.directory: x}", "s.yaml:2: overrides: checkpoint.directory: a sweep sets"),
        ("overrides: {tracking: {group: x}}", "s.yaml:2: overrides: tracking: a sweep sets tracking.group itself"),
        ("points: [{train.seed: 1}]", "s.yaml:2: points: train.seed: a sweep sets train.seed itself"),
        ("seeds: [1, 1]", "s.yaml:2: seeds: one is there twice"),
        ("seeds: []", "s.yaml:2: seeds: must have at least 1 item"),
        ("seeds: [-1]", "s.yaml:2: seeds.0: must be greater than or equal to 0, given -1"),
        ("grid: {a: [1]}\npoints: [{a: 1}]", "s.yaml:2: grid and points: one of grid, points and random"),
        ("random: {draws: 2, values: {a: {low: 2, high: 1}}}", "low: 2 is not below high, 1"),
        ("random: {draws: 2, values: {a: {low: 0, high: 1, log: true}}}", "low: 0 has no logarithm"),
        ("random: {draws: 2, values: {optimizer.lt: [1]}}", "config: lt=1: s.yaml:2: optimizer.lt: unknown key"),
        (
            "random: {draws: 0, values: {optimizer.lr: [1]}}",
            "s.yaml:2: random.draws: must be greater than or equal to 1",
        ),
        (f"seeds: {list(range(101))}\ngrid: {{a: {list(range(100))}}}", "10,100 runs; at most 10,000"),
        (
            f"grid: {{{', '.join(f'a{key}: [1, 2, 3, 4]' for key in range(30))}}}",
            "grid: 1,152,921,504,606,846,976 comb",
        ),
        ("random: {draws: 2, values: {a: []}}", "s.yaml:2: random.values: a has no values"),
        ("gird: {}", "s.yaml:2: gird: unknown key; did you mean grid?"),
    ],
    ids=lambda value: value.partition("[")[0],
)
def test_a_mistake_is_one_line(text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(SMALL)
    Path("s.yaml").write_text(f"config: run.yaml\n{text}\n")
    with pytest.raises(UserError) as raised:
        LoadedSweep(Path("s.yaml"))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_configuration_that_is_not_there(sweep: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"yaml:1: config: .*ruin.yaml: no such file; the nearest in .* run.yaml"):
        sweep(config="ruin.yaml")
    with pytest.raises(UserError, match=r"yaml:1: config: .* cannot be read: embedded null byte"):
        sweep(config="a\0")


def test_a_sweep_has_a_name(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(SMALL)
    (tmp_path / "a b.yaml").write_text("config: run.yaml\n")
    with pytest.raises(UserError, match=r"a b.yaml: a sweep has its file's name"):
        LoadedSweep(tmp_path / "a b.yaml")


def test_every_key_is_described() -> None:
    assert all(field.description for field in Sweep.model_fields.values())

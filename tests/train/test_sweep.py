"""`ssam-scale sweep`: what is done is not done again, what failed or was stopped goes on, and all are compared."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from ssam_scale import sweep
from ssam_scale.errors import UserError
from ssam_scale.tracking.store import open_store
from tests.support.processes import daemon, run
from tests.support.runs import ssam_scale, write_config

pytestmark = pytest.mark.slow


@pytest.fixture
def home(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a run's configuration, run.yaml, in which one is."""
    write_config(tmp_path / "run.yaml", data, train={"epochs": 1, "device": "cpu"}, perturbation={"rho": 0.1})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(home: Path, **keys: Any) -> Path:
    path = home / "first.yaml"
    path.write_text(yaml.safe_dump({"config": "run.yaml", **keys}, sort_keys=False))
    return path


def results(home: Path) -> dict[str, Any]:
    return {path.parent.name: json.loads(path.read_text()) for path in home.glob("checkpoints/first/*/result.json")}


def test_a_sweep(home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = write(home, methods=["base", "sam"], seeds=[0, 1])
    assert ssam_scale("sweep", path, "--dry-run") == 0
    assert capfd.readouterr().out.splitlines()[0] == "base seed 0: to do (checkpoints/first/base-seed-0)"
    assert not (home / "checkpoints").exists()

    assert ssam_scale("sweep", path, "--at-once", "2") == 0
    out = capfd.readouterr().out
    found = results(home)
    assert sorted(found) == ["base-seed-0", "base-seed-1", "sam-seed-0", "sam-seed-1"]
    for name, result in found.items():
        assert f"{name.replace('-', ' ')}: top-1 {result['top1']:.2f}% in " in out
    assert "gain / SAM" in out
    store = open_store(f"sqlite:///{home}/mlflow.db", create=False)
    runs = store.search_runs([store.get_experiment_by_name("ssam_scale").experiment_id])
    trained = [run for run in runs if "kind" not in run.data.tags]  # others show the mean of several
    assert {run.data.tags["group"] for run in trained} == {"first"}
    assert {run.info.run_name for run in trained} == {"base seed 0", "base seed 1", "sam seed 0", "sam seed 1"}
    # The same run by hand, of the configuration beside it, ends with the same accuracy.
    assert ssam_scale("train", "-c", "checkpoints/first/sam-seed-1/config.yaml", "checkpoint.directory=alone") == 0
    assert json.loads(Path("alone/result.json").read_text())["loss"] == found["sam-seed-1"]["loss"]

    # Again: nothing is trained. With one seed more: that one is.
    stamps = {path: path.stat().st_mtime_ns for path in home.glob("checkpoints/first/*/result.json")}
    capfd.readouterr()
    assert ssam_scale("sweep", path) == 0
    assert "4 of 4 runs are done" in capfd.readouterr().out
    assert ssam_scale("sweep", path, "--dry-run", "--folder", home / "checkpoints" / "first") == 0  # by another name
    assert capfd.readouterr().out.count(": top-1 ") == 4
    assert ssam_scale("sweep", write(home, methods=["base", "sam"], seeds=[0, 1, 2]), "--dry-run") == 0
    assert capfd.readouterr().out.count(": to do (") == 2
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps

    # A result that is gone is in the checkpoint too.
    gone = home / "checkpoints/first/sam-seed-0/result.json"
    content = json.loads(gone.read_text())
    gone.unlink()
    assert ssam_scale("sweep", path) == 0
    assert json.loads(gone.read_text()) == content
    stamps[gone] = gone.stat().st_mtime_ns

    # What is there is of the configuration that the sweep had then.
    changed = write(home, methods=["base", "sam"], seeds=[0, 1], overrides={"optimizer.lr": 0.07})
    assert ssam_scale("sweep", changed) == 2
    assert (
        "checkpoints/first/base-seed-0: has been trained with optimizer.lr=0.05, which is 0.07 now"
        in capfd.readouterr().err
    )
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


def test_a_run_that_fails_keeps_no_other_from_its_turn(home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """It is told, with where its own words are, and tried again next time."""
    methods = {"high": {"model.pretrained": "none.safetensors"}, "config": None}
    assert ssam_scale("sweep", write(home, methods=methods)) == 1
    said = capfd.readouterr()
    line = next(line for line in said.out.splitlines() if line.startswith("[1/2] high seed 0: failed: exit code 2"))
    assert "none.safetensors" in line
    assert "(checkpoints/first/high-seed-0/train.log)" in line
    assert "1 of 2 runs failed; the same command tries them again" in said.err
    assert list(results(home)) == ["config-seed-0"]
    # The mistake can be mended in the file: nothing was trained by it.
    assert ssam_scale("sweep", write(home, methods={**methods, "high": {"optimizer.lr": 0.02}})) == 0
    assert sorted(results(home)) == ["config-seed-0", "high-seed-0"]


def wait_for(what: Any, seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_values_that_are_lists_or_sections(home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = write(home, grid={"data.crop_scale": [[0.1, 1], [0.2, 1]], "perturbation": [None, {"preset": "sam"}]})
    assert ssam_scale("sweep", path, "--dry-run") == 0
    assert capfd.readouterr().out.count(": to do (") == 4


@pytest.mark.parametrize("damaged", ["", "[]", "{}", '{"top1": null}', '{"top1": "x"}'])
def test_a_result_that_is_none(home: Path, capfd: pytest.CaptureFixture[str], damaged: str) -> None:
    path, folder = write(home), home / "checkpoints" / "first" / "config-seed-0"
    assert ssam_scale("sweep", path, "--tasks") == 0  # writes its configuration
    (folder / "result.json").write_text(damaged)
    assert ssam_scale("sweep", path, "--dry-run") == 2
    assert "result.json: is not a run's result; remove checkpoints/first/config-seed-0, and" in capfd.readouterr().err


@pytest.mark.exhaustive
def test_it_goes_on_where_it_was_told_to_end(home: Path) -> None:
    """At SIGTERM each run saves; the next command ends with the weights of one that was never told."""
    path = write(home, methods=["config"], seeds=[0, 1], overrides={"train.epochs": 40, "checkpoint.keep": 1})
    command = [sys.executable, "-m", "ssam_scale", "sweep", path, "--at-once", "2"]
    with daemon(command, home / "log") as process:
        wait_for(lambda: len({path.parent for path in home.glob("checkpoints/first/*/epoch_*")}) == 2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 75
    assert (home / "log").read_text().count(": told to end; goes on when this command is given again") == 2
    assert results(home) == {}
    done = run(command, cwd=home)
    assert done.returncode == 0, done.stdout
    whole = results(home)
    assert len(whole) == 2
    assert ssam_scale("train", "-c", "checkpoints/first/config-seed-0/config.yaml", "checkpoint.directory=alone") == 0
    assert json.loads(Path("alone/result.json").read_text())["loss"] == whole["config-seed-0"]["loss"]


def test_runs_end_with_a_sweep_that_is_killed(home: Path) -> None:
    path = write(home, overrides={"train.epochs": 1000})
    with daemon([sys.executable, "-m", "ssam_scale", "sweep", path], home / "log") as process:
        wait_for(lambda: list(home.glob("checkpoints/first/*/epoch_*")))
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert children
        process.kill()
        process.wait()
    wait_for(lambda: not any(Path(f"/proc/{child}").exists() for child in children))


@pytest.mark.exhaustive
def test_two_processes_a_run(home: Path) -> None:
    """torchrun starts them: the same accuracy as of one, to rounding."""
    assert ssam_scale("sweep", write(home, methods=["base"], overrides={"model.name": "resnet18"})) == 0
    alone = results(home)["base-seed-0"]
    assert ssam_scale("sweep", write(home, methods=["base"]), "--processes", "2", "--folder", "two") == 0
    both = json.loads(Path("two/base-seed-0/result.json").read_text())
    assert both["images"] == alone["images"]
    assert "on 2 processes" in Path("two/base-seed-0/train.log").read_text()


def test_each_run_has_gpus_of_its_own() -> None:
    assert [slot.gpus for slot in sweep.slots(2, 2, ["4", "5", "6", "7", "8"])] == [("4", "5"), ("6", "7")]
    assert [slot.gpus for slot in sweep.slots(1, 1, ["4", "5"])] == [("4",)]
    assert [slot.gpus for slot in sweep.slots(2, 1, [])] == [(), ()]
    with pytest.raises(UserError, match=r"--at-once 2 with --processes 2 needs 4 GPUs; there are 3"):
        sweep.slots(2, 2, ["0", "1", "2"])


@pytest.mark.parametrize(("given", "found"), [("", []), ("2,5", ["2", "5"]), ("-1", []), ("GPU-a", ["GPU-a"])])
def test_the_gpus_that_this_process_may_use(given: str, found: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert sweep.visible_gpus() == found


def test_a_folder_of_something_else(home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Is left alone; what a file manager has left in it is no matter."""
    folder = home / "checkpoints/first/config-seed-0"
    folder.mkdir(parents=True)
    (folder / ".DS_Store").write_text("")
    assert ssam_scale("sweep", write(home), "--dry-run") == 0
    (folder / "thesis.tex").write_text("")
    capfd.readouterr()
    assert ssam_scale("sweep", write(home)) == 2
    assert "config-seed-0: is no run's folder, as it has no config.yaml; move it away" in capfd.readouterr().err


def test_a_launcher_is_not_wanted(
    home: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every process of it would train all runs."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert ssam_scale("sweep", write(home)) == 2
    assert "sweep: starts its runs' processes itself: give --processes" in capfd.readouterr().err


def test_a_mistake_is_told_before_anything_is_written(home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert ssam_scale("sweep", write(home, methods=["sam"], grid={"perturbation.roh": [1]})) == 2
    assert capfd.readouterr().err.count("\n") == 1
    assert ssam_scale("sweep", home / "none.yaml") == 2
    assert "none.yaml: no such file" in capfd.readouterr().err
    Path("file").write_text("")
    assert ssam_scale("sweep", write(home), "--folder", "file/below") == 2
    assert "file/below" in capfd.readouterr().err
    assert sorted(path.name for path in home.iterdir()) == ["file", "first.yaml", "mlflow.db", "run.yaml"]

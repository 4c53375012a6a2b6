"""Runs in a real SQLite store, in this process. How processes end is in test_endings.py."""

from __future__ import annotations

import contextlib
import logging
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from ssam_scale.config.schema import Config
from ssam_scale.errors import UserError
from ssam_scale.tracking.commands import mlflow_command
from ssam_scale.tracking.run import WARMUP_STEPS, Run, flatten, open_run
from ssam_scale.tracking.store import check_experiment, check_store, experiment_id, network_disk, open_store, refused
from ssam_scale.tracking.timer import PhaseSummary

MakeConfig = Callable[..., Config]


def stored(uri: str, run: Run) -> Any:
    return open_store(uri, create=False).get_run(run.id)


def test_a_run_holds_config_environment_and_metrics(config: MakeConfig, uri: str, tmp_path: Path) -> None:
    resolved = config("depth", seed=3)
    (tmp_path / "table.txt").write_text("hello")
    with open_run(resolved, enabled=True, extra_tags={"group": "g", "backend": "fsdp2"}) as run:
        run.log_window(
            PhaseSummary({"data": 0.5, "ascent forward": 1.5}, (2.0, 4.0, 3.0)),
            loss=2.5,
            lr=0.1,
            images_per_step=60,
            step=3,
            densities=[0.2, 0.5, 0.5],
        )
        run.log_evaluation(top1=50.0, top5=90.0, loss=1.5, epoch=1, step=3)
        run.log_epoch(epoch=1, seconds=12.0, step=3)
        run.log_refresh(seconds=1.5, step=3)
        run.log_artifact(tmp_path / "table.txt", "notes")
        assert run.finish_summary() == {
            "summary/step_time": 3.5,  # a mean of 3 s, and a third of the refresh
            "summary/step_time_p50": 3.0,
            "summary/step_time_p95": pytest.approx(3.9),
            "summary/step_time_max": 4.0,
            "summary/density": pytest.approx(0.4),
            "summary/top1": 50.0,
            "summary/best_top1": 50.0,
        }
    found = stored(uri, run)
    assert found.info.status == "FINISHED"
    assert found.info.run_name == "ssam-depth resnet18"
    assert found.data.metrics == {
        "train/loss": 2.5,
        "train/lr": 0.1,
        "train/images_per_second": 20.0,  # 3 steps of 60 images in 9 s
        "time/step": 3.0,
        "time/step_p95": pytest.approx(3.9),
        "time/step_max": 4.0,
        "time/data": 0.5,
        "time/ascent_forward": 1.5,
        "val/top1": 50.0,
        "val/top5": 90.0,
        "val/loss": 1.5,
        "epoch": 1.0,
        "time/epoch": 12.0,
        "mask/density": pytest.approx(0.4),
        "time/refresh": 1.5,
        "summary/step_time": 3.5,
        "summary/step_time_p50": 3.0,
        "summary/step_time_p95": pytest.approx(3.9),
        "summary/step_time_max": 4.0,
        "summary/density": pytest.approx(0.4),
        "summary/top1": 50.0,
        "summary/best_top1": 50.0,
    }
    assert found.data.params == flatten(resolved)
    assert found.data.params["perturbation.mask.cut"] == "[0.25, 0.75]"
    tags = found.data.tags
    assert (tags["method"], tags["backend"], tags["group"], tags["world_size"]) == ("ssam-depth", "fsdp2", "g", "1")
    assert {"version/python", "version/torch", "version/timm", "version/mlflow", "cpu", "cores", "memory_gib"} <= {
        *tags
    }
    assert (tags["mask"], tags["plan"], tags["density"]) == ("depth rotate 0.25–0.75", "every step", "0.40")
    assert tags["hardware"].endswith("cores")
    assert "failure" not in tags
    artifacts = tmp_path / "mlartifacts" / "ssam_scale" / str(run.id) / "artifacts"
    assert Config.model_validate(yaml.safe_load((artifacts / "config.yaml").read_text())) == resolved
    assert (artifacts / "notes" / "table.txt").read_text() == "hello"


def test_summary_leaves_out_the_first_steps_and_keeps_the_best(config: MakeConfig, uri: str) -> None:
    with open_run(config(), enabled=False) as run:
        run.log_window(PhaseSummary({}, (100.0,) * (WARMUP_STEPS - 3)), loss=1, lr=1, images_per_step=1, step=7)
        run.log_window(PhaseSummary({}, (100.0,) * 3 + (1.0, 2.0, 9.0)), loss=1, lr=1, images_per_step=1, step=13)
        for top1 in (30.0, 40.0, 35.0):
            run.log_evaluation(top1=top1, top5=1, loss=1, epoch=1, step=13)
        assert run.finish_summary() == {
            "summary/step_time": 4.0,
            "summary/step_time_p50": 2.0,
            "summary/step_time_p95": pytest.approx(8.3),
            "summary/step_time_max": 9.0,
            "summary/top1": 35.0,
            "summary/best_top1": 40.0,
        }


def test_times_are_recorded_and_summed_up_by_kind_of_step(config: MakeConfig, uri: str) -> None:
    sparse = PhaseSummary({"perturb": 1.0}, (7.0, 9.0, 20.0))
    base = PhaseSummary({}, (2.0,) * WARMUP_STEPS + (4.0,))
    every = PhaseSummary({"perturb": 0.25}, sparse.step_times + base.step_times, {"sparse": sparse, "base": base})
    with open_run(config(), enabled=True) as run:
        run.log_window(every, loss=1, lr=1, images_per_step=1, step=13)
        summary = run.finish_summary()
    assert summary["summary/sparse/step_time"] == 12.0  # all of them, as there are few
    assert summary["summary/base/step_time"] == 4.0
    found = stored(uri, run).data.metrics
    assert {name: value for name, value in found.items() if name.startswith("time/")} == {
        "time/step": 2.0,
        "time/step_p95": pytest.approx(12.85),
        "time/step_max": 20.0,
        "time/perturb": 0.25,
        "time/sparse/step": 9.0,
        "time/sparse/perturb": 1.0,
        "time/base/step": 2.0,
    }


def test_a_window_without_steps_and_a_diverged_loss(config: MakeConfig, uri: str) -> None:
    with open_run(config(), enabled=True) as run:
        run.log_window(PhaseSummary({}, ()), loss=float("nan"), lr=0.1, images_per_step=1, step=1)
        run.log({"train/loss": float("inf")}, step=2)
        assert run.finish_summary() == {}
    assert set(stored(uri, run).data.metrics) == {"train/loss", "train/lr"}


def test_a_disabled_run_accepts_everything_and_stores_nothing(config: MakeConfig, tmp_path: Path) -> None:
    with open_run(config(uri="http://127.0.0.1:9"), enabled=False) as run:
        run.log({"a": 1.0}, 1)
        run.log_artifact(tmp_path / "absent")
        assert run.id is None


def test_an_exception_marks_the_run_failed_and_passes_on(config: MakeConfig, uri: str) -> None:
    def train(run: Run) -> None:
        with run:
            run.log({"train/loss": 1.0}, step=1)
            raise RuntimeError("CUDA out of memory\nTried to allocate")

    run = open_run(config(), enabled=True)
    with pytest.raises(RuntimeError, match="CUDA"):
        train(run)
    found = stored(uri, run)
    assert (found.info.status, found.data.tags["failure"]) == ("FAILED", "RuntimeError: CUDA out of memory")
    assert found.data.metrics == {"train/loss": 1.0}
    assert found.info.end_time is not None


@pytest.mark.parametrize(
    ("error", "status", "failure"),
    [
        (UserError("no such file"), "FAILED", "no such file"),
        (KeyboardInterrupt(), "KILLED", "SIGINT"),
        (SystemExit(3), "FAILED", "SystemExit: 3"),
        (SystemExit(0), "FINISHED", None),
        (ValueError(), "FAILED", "ValueError: ValueError"),
    ],
)
def test_endings(config: MakeConfig, uri: str, error: BaseException, status: str, failure: str | None) -> None:
    with pytest.raises(type(error)), open_run(config(), enabled=True) as run:
        raise error
    found = stored(uri, run)
    assert (found.info.status, found.data.tags.get("failure")) == (status, failure)


def test_handlers_are_put_back(config: MakeConfig) -> None:
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    with open_run(config(), enabled=True):
        assert signal.getsignal(signal.SIGTERM) is not before[0]
    assert [signal.getsignal(number) for number in numbers] == before


def test_resuming_continues_the_same_run(config: MakeConfig, uri: str) -> None:
    with contextlib.suppress(RuntimeError), open_run(config(), enabled=True) as first:
        first.log_evaluation(top1=60.0, top5=90.0, loss=1.0, epoch=1, step=10)
        raise RuntimeError("node lost")
    changed = config().model_copy(update={"train": config().train.model_copy(update={"epochs": 5})})
    with open_run(changed, enabled=True, resume_run_id=first.id) as second:
        assert stored(uri, second).info.status == "RUNNING"
        second.log_evaluation(top1=55.0, top5=90.0, loss=1.0, epoch=2, step=20)
        assert second.finish_summary() == {"summary/top1": 55.0, "summary/best_top1": 60.0}
    assert second.id == first.id
    found = stored(uri, second)
    assert found.info.status == "FINISHED"
    assert "failure" not in found.data.tags
    assert (found.data.tags["resumed"], found.data.params["train.epochs"]) == ("1", "2")
    assert found.data.tags["changed.train.epochs"] == "5"
    history = open_store(uri, create=False).get_metric_history(second.id, "val/top1")
    assert [(point.step, point.value) for point in history] == [(10, 60.0), (20, 55.0)]


def test_resuming_what_the_store_does_not_know_starts_anew(config: MakeConfig, uri: str) -> None:
    with open_run(config(), enabled=True, resume_run_id="0" * 32) as run:
        pass
    assert stored(uri, run).data.tags["resumed_from"] == "0" * 32


@pytest.mark.slow
def test_long_values_are_cut_to_what_mlflow_takes(config: MakeConfig, uri: str) -> None:
    base = config()
    long = base.model_copy(update={"model": base.model.model_copy(update={"kwargs": {"text": "x" * 10_000}})})
    with open_run(long, enabled=True, extra_tags={"note": "y" * 10_000}) as run:
        pass
    found = stored(uri, run)
    assert found.data.params["model.kwargs.text"] == "x" * 5999 + "…"
    assert len(found.data.tags["note"]) == 8000


def test_no_password_reaches_the_store(config: MakeConfig) -> None:
    base = config(uri="http://me:secret@host:5000/x")
    weights = {"weights": "https://secret@host/x.pth"}
    flat = flatten(base.model_copy(update={"model": base.model.model_copy(update={"kwargs": weights})}))
    assert flat["tracking.uri"] == "http://me:***@host:5000/x"
    assert flat["model.kwargs.weights"] == "https://***@host/x.pth"


def test_a_folder_is_a_store_too(config: MakeConfig, tmp_path: Path) -> None:
    uri = f"file:{tmp_path}/mlruns"
    with open_run(config(uri=uri), enabled=True) as run:
        run.log({"train/loss": 1.0}, step=1)
    assert stored(uri, run).info.status == "FINISHED"


@pytest.mark.slow
def test_the_command_that_brings_a_deleted_experiment_back_works_as_it_is_printed(
    config: MakeConfig, uri: str, tmp_path: Path, child_environment: dict[str, str]
) -> None:
    folder = tmp_path / "a project's folder"
    folder.mkdir()
    uri = f"sqlite:///{Path(shutil.move(tmp_path / 'mlflow.db', folder))}"
    client = open_store(uri, create=False)
    client.delete_experiment(experiment_id(client, uri, "ssam_scale"))
    with pytest.raises(UserError, match=r"was deleted; choose another name, or bring it back with `.*`$") as caught:
        experiment_id(client, uri, "ssam_scale")
    with pytest.raises(UserError) as early:  # in the first second, and in a dry run
        check_experiment(uri, "ssam_scale")
    assert str(early.value) == str(caught.value)
    command = str(caught.value).split("`")[1]
    subprocess.run(command, shell=True, check=True, capture_output=True, env=child_environment)
    assert client.get_experiment_by_name("ssam_scale").lifecycle_stage == "active"
    check_experiment(uri, "ssam_scale")
    check_experiment(f"sqlite:///{tmp_path}/none.db", "ssam_scale")
    assert not (tmp_path / "none.db").exists()


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("sqlite:///mlflow.db", "MLFLOW_TRACKING_URI=sqlite:///mlflow.db "),
        ("file:my runs", "MLFLOW_ALLOW_FILE_STORE=true MLFLOW_TRACKING_URI='file:my runs' "),
        ("postgresql://me:secret@host/db", "MLFLOW_TRACKING_URI='postgresql://me:***@host/db' "),
    ],
)
def test_a_command_for_any_store(uri: str, expected: str) -> None:
    assert mlflow_command(uri, "experiments", "search").startswith(expected)


def test_a_locked_database_is_not_advised_to_be_used() -> None:
    # In the words that MLflow passes on, after half a minute of trying.
    told = refused("sqlite:///mlflow.db", "(sqlite3.OperationalError) database is locked\n[SQL: SELECT]")
    assert "`fuser -v mlflow.db` names it" in told
    assert "tracking.uri=sqlite:///OTHER.db" in told
    assert told.count("mlflow.db") == 2
    assert "sqlite:///mlflow.db" not in refused("sqlite:///mlflow.db", "attempt to write a readonly database")[30:]


MOUNTS = """
22 1 0:20 / / rw,relatime - ext4 /dev/root rw
30 22 0:40 / /home rw,relatime shared:1 - nfs4 server:/home rw,vers=4.2
31 30 0:41 / /home/me/local rw - xfs /dev/sda1 rw
32 22 0:42 / /scratch\\040disk rw - lustre 10.0.0.1@tcp:/scratch rw
33 22 0:43 / /mnt rw - nfs server:/mnt rw
34 33 0:44 / /mnt rw - ext4 /dev/sdb1 rw
"""


@pytest.mark.parametrize(
    ("path", "disk"),
    [
        ("/data/mlflow.db", None),
        ("/home/me/project/mlflow.db", "nfs4"),
        ("/home/me/local/mlflow.db", None),
        ("/homes/mlflow.db", None),
        ("/scratch disk/mlflow.db", "lustre"),
        ("/mnt/mlflow.db", None),
    ],
)
def test_network_disks_are_known(path: str, disk: str | None) -> None:
    assert network_disk(Path(path), MOUNTS) == disk


def test_a_database_on_a_network_disk_is_warned_of_with_the_way_out(
    uri: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    check_store(uri)
    assert caplog.messages == []
    monkeypatch.setattr("ssam_scale.tracking.store.network_disk", lambda path: "nfs4")
    check_store(uri)
    (told,) = caplog.messages
    assert told.startswith(f"tracking.uri {uri} is on a network disk (nfs4)")
    assert "server --backend-store-uri sqlite:////LOCAL/mlflow.db --host 127.0.0.1 --port 5000`" in told
    assert (Path(__file__).parents[2] / told.split()[-1]).is_file()


def unusable(tmp_path: Path) -> dict[str, tuple[str, str]]:
    (tmp_path / "text.db").write_text("this is no database " * 100)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        closed = probe.getsockname()[1]
    return {
        "scheme": ("htp://host", "is no MLflow tracking URI; use sqlite:///mlflow.db"),
        "empty": ("", "is no MLflow tracking URI"),
        "memory": ("sqlite://", "keeps nothing"),
        "not a database": (f"sqlite:///{tmp_path}/text.db", "file is not a database"),
        "not a folder": (f"sqlite:///{tmp_path}/text.db/x.db", "Not a directory|File exists"),
        "refused": (f"http://127.0.0.1:{closed}", "no MLflow server answers .*refused.*; start one, or use sqlite"),
        "unknown host": ("http://tracking.invalid:5000", "no MLflow server answers"),
        "login": (f"http://u:secret@127.0.0.1:{closed}", "no MLflow server answers"),
        "database server": (f"postgresql://u:secret@127.0.0.1:{closed}/db", "refused"),
    }


@pytest.mark.parametrize(
    "case",
    [
        "scheme",
        "empty",
        "memory",
        "not a database",
        "not a folder",
        "refused",
        "unknown host",
        "login",
        "database server",
    ],
)
def test_an_unusable_store_is_one_line_naming_it(config: MakeConfig, tmp_path: Path, case: str) -> None:
    uri, message = unusable(tmp_path)[case]
    begin = time.monotonic()
    with pytest.raises(UserError, match=message) as caught:
        open_run(config(uri=uri), enabled=True).__enter__()
    text = str(caught.value)
    assert uri.replace("secret", "***") in text
    assert ":secret" not in "".join(traceback.format_exception(caught.value, caught.value, caught.value.__traceback__))
    assert "\n" not in text
    # Not a matter of speed: MLflow's own retries take 100 s or more in these cases.
    assert time.monotonic() - begin < 60
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.slow
def test_a_server_that_accepts_but_never_answers_is_given_up(config: MakeConfig) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(UserError, match=re.escape(f"{uri}: no MLflow server answers (timed out)")):
            open_run(config(uri=uri), enabled=True).__enter__()


def test_a_store_that_fails_during_training_does_not_end_it(
    config: MakeConfig, uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), open_run(config(), enabled=True) as run:
        with sqlite3.connect(tmp_path / "mlflow.db") as database:
            database.execute("ALTER TABLE metrics RENAME TO elsewhere")
            database.execute("ALTER TABLE latest_metrics RENAME TO elsewhere_too")
        run.log({"train/loss": 1.0}, step=1)
        give_up = time.monotonic() + 60
        while "waits" not in caplog.text and time.monotonic() < give_up:
            time.sleep(0.05)
        with sqlite3.connect(tmp_path / "mlflow.db") as database:
            database.execute("ALTER TABLE elsewhere RENAME TO metrics")
            database.execute("ALTER TABLE elsewhere_too RENAME TO latest_metrics")
    found = stored(uri, run)
    assert (found.info.status, found.data.metrics) == ("FINISHED", {"train/loss": 1.0})
    assert "tracking store does not answer, what is recorded waits in" in caplog.text
    assert "no such table: " in caplog.text
    assert caplog.messages[1:] == ["tracking store answers again, and has all that waited"]


@pytest.mark.slow
def test_a_network_that_cannot_be_exported_is_a_warning(config: MakeConfig, uri: str) -> None:
    """In a process of its own: MLflow's flavour of PyTorch changes the root logger when it is imported."""
    code = (
        "import sys, yaml\nfrom torch import nn\nfrom ssam_scale.config.schema import Config\n"
        "from ssam_scale.models.torchvision_ops import ensure_torchvision\n"
        "from ssam_scale.tracking.run import open_run\nensure_torchvision()\n"
        "class Jump(nn.Module):\n    def forward(self, x):\n        return x if x.sum() > 0 else -x\n"
        "with open_run(Config.model_validate(yaml.safe_load(sys.argv[1])), enabled=True) as run:\n"
        "    run.log_network(Jump, side=8, classes=4, step=1)\n"
    )
    given = yaml.safe_dump(config().model_dump(mode="json"))
    done = subprocess.run([sys.executable, "-c", code, given], capture_output=True, text=True, check=True)
    assert re.search(r"the model of run \w{32} could not be stored: ", done.stderr)
    (run,) = open_store(uri, create=False).search_runs(["1"])
    assert run.info.status == "FINISHED"

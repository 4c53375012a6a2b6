"""A tracking store that fails for real: a server stopped and killed, a full disk, a database that sixteen write to."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from ssam_scale.config.schema import Config
from ssam_scale.models.torchvision_ops import ensure_torchvision
from ssam_scale.tracking.run import Run, open_run
from ssam_scale.tracking.store import open_store
from tests.support.mlflow_server import MLflowServer
from tests.support.processes import free_port, wait_until
from tests.support.stores import put_store

pytestmark = pytest.mark.slow

MakeConfig = Callable[..., Config]

# Importing MLflow takes seconds, more on a loaded machine; nothing here tests speed.
PATIENCE_S = 120


@pytest.fixture(autouse=True)
def _patient_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs wait for a store that answers, on a slow machine, too; how they do not is in test_closing."""
    monkeypatch.setattr("ssam_scale.tracking.trackers.mlflow.CLOSE_WITHIN_S", float(PATIENCE_S))


@pytest.fixture
def _slow_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that is back when the run ends may take long for a request without being given up."""
    monkeypatch.setattr("ssam_scale.tracking.spool.ANSWER_WITHIN_S", PATIENCE_S)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MLflowServer]:
    """Over a database, with artifacts that pass through it."""
    folder = tmp_path_factory.mktemp("server")
    put_store(folder / "mlflow.db")
    with MLflowServer(f"sqlite:///{folder}/mlflow.db", folder / "log", folder / "artifacts") as running:
        yield running


def steps_of(uri: str, run: Run, key: str = "train/loss") -> list[int]:
    return [point.step for point in open_store(uri, create=False).get_metric_history(run.id, key)]


def unsent(run: Run, folder: Path) -> Path:
    return folder / "checkpoints" / f"unsent_{run.id}"


def records(run: Run, folder: Path) -> int:
    """Lines on disk; 0 if there is no file."""
    path = unsent(run, folder) / "records.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Warnings, ours and MLflow's and its drivers', by their first words."""
    return [" ".join(record.getMessage().split()[:4]) for record in caplog.records if record.levelno >= logging.WARNING]


OUTAGE = ["tracking store does not", "tracking store answers again,"]


@pytest.mark.usefixtures("_slow_store")
def test_a_server_that_is_stopped_holds_nothing_up(
    server: MLflowServer,
    config: MakeConfig,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "table.csv").write_text("1")
    with open_run(config(uri=server.address), enabled=True) as run:
        with monkeypatch.context() as impatient:
            # Given up after a second, so that the test need not wait for ten.
            impatient.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
            impatient.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
            server.pause()
            for step in range(1, 3001):
                run.log({"train/loss": 1.0, "nan": float("nan"), "inf": float("inf")}, step)
            run.log_artifact(tmp_path / "table.csv", "tables")
            run.no_saving("a test")
            wait_until(lambda: records(run, tmp_path) > 3000, PATIENCE_S, "all of it on disk")
            wait_until(lambda: OUTAGE[0] in told(caplog), PATIENCE_S, "a warning")
        server.go_on()
    assert steps_of(server.address, run) == list(range(1, 3001))
    client = open_store(server.address, create=False)
    data = client.get_run(run.id).data
    assert data.metrics["nan"] != data.metrics["nan"]
    assert data.metrics["inf"] > 1e308
    assert data.tags["saving"] == "unknown: a test"
    assert [each.path for each in client.list_artifacts(run.id)] == ["config.yaml", "tables"]
    assert [each.path for each in client.list_artifacts(run.id, "tables")] == ["tables/table.csv"]
    assert not unsent(run, tmp_path).exists()
    assert told(caplog) == OUTAGE


@pytest.mark.parametrize("silent_at", ["create_logged_model", "log_model_artifacts", "finalize_logged_model"])
def test_a_model_is_given_up_where_its_store_falls_silent(
    server: MLflowServer,
    config: MakeConfig,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    silent_at: str,
) -> None:
    """At each of the requests that storing it takes; the run ends all the same."""
    from mlflow import MlflowClient

    ensure_torchvision()
    asked = getattr(MlflowClient, silent_at)

    def ask_nobody(client: MlflowClient, *args: Any, **kwargs: Any) -> Any:
        server.pause()
        return asked(client, *args, **kwargs)

    def network() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4))

    with open_run(config(uri=server.address), enabled=True) as run:
        with monkeypatch.context() as silent:
            silent.setattr(MlflowClient, silent_at, ask_nobody)
            run.log_network(network, side=8, classes=4, step=1)
        server.go_on()
    assert f"the model of run {run.id} could not be stored: timed out" in caplog.text
    client = open_store(server.address, create=False)
    # It has been waited for, so that the end of the run may come from the process that sends what is left.
    wait_until(lambda: client.get_run(run.id).info.status == "FINISHED", PATIENCE_S, "the end of the run")


CHILD = """
import os, signal, sys
from pathlib import Path
from ssam_scale.config.schema import Config
from ssam_scale.tracking.run import open_run

config = Config.model_validate_json(Path(sys.argv[1]).read_text())
with open_run(config, enabled=True) as run:
    run.log({"train/loss": 1.0}, 10)
    print(run.id, flush=True)
    sys.stdin.readline()
    for step in range(20, 2000, 10):
        run.log({"train/loss": 1.0}, step)
    run.log({"last": 1.0}, 2000)
    signal.pause()
"""


def test_a_server_is_killed_and_comes_back(
    server: MLflowServer,
    config: MakeConfig,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    child_environment: dict[str, str],
) -> None:
    """One run lives on, one ends, one is killed meanwhile and resumed. All have every point once."""
    resolved = config(uri=server.address)
    (tmp_path / "config.json").write_text(resolved.model_dump_json())
    killed = subprocess.Popen(
        [sys.executable, "-c", CHILD, tmp_path / "config.json"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=child_environment,
    )
    try:
        assert killed.stdin is not None
        assert killed.stdout is not None
        killed_id = killed.stdout.readline().strip()
        lives = open_run(resolved, enabled=True).__enter__()
        ends = open_run(resolved, enabled=True).__enter__()
        server.kill()
        killed.stdin.write("\n")
        killed.stdin.flush()
        left = tmp_path / "checkpoints" / f"unsent_{killed_id}" / "records.jsonl"
        wait_until(lambda: left.exists() and b'"last"' in left.read_bytes(), PATIENCE_S, "all of it on disk")
        killed.kill()
        killed.wait()
    finally:
        killed.kill()
        killed.communicate()
    for step in range(1, 501):
        lives.log({"train/loss": 1.0}, step)
        ends.log({"train/loss": 1.0}, step)
    ends.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)  # the end with the least patience
    assert f"500 metrics, its end (KILLED) of run {ends.id} did not reach" in caplog.text
    assert told(caplog)[:2] == [OUTAGE[0]] * 2  # one of each run
    assert len(caplog.messages) == 3
    server.start()
    wait_until(lambda: records(lives, tmp_path) == 1, PATIENCE_S, "nothing that waits")
    lives.__exit__(None, None, None)
    assert steps_of(server.address, lives) == list(range(1, 501))
    command = caplog.text.split("or by: ")[1].splitlines()[0]
    assert command == f"ssam-scale send {unsent(ends, tmp_path)}"
    # Nobody types it: the process that was left behind has waited for the server.
    wait_until(lambda: not unsent(ends, tmp_path).exists(), PATIENCE_S, "all of it sent")
    assert steps_of(server.address, ends) == list(range(1, 501))
    client = open_store(server.address, create=False)
    assert client.get_run(ends.id).info.status == "KILLED"
    # So has its watcher.
    wait_until(lambda: client.get_run(killed_id).info.status == "KILLED", PATIENCE_S, "the mark")
    failure = client.get_run(killed_id).data.tags["failure"]
    assert "SIGKILL" in failure
    assert "ssam-scale send" not in failure  # there is nothing left to send
    assert [point.step for point in client.get_metric_history(killed_id, "train/loss")] == list(range(10, 2000, 10))
    with open_run(resolved, enabled=True, resume_run_id=killed_id) as again:
        for step in range(1000, 3000, 10):
            again.log({"train/loss": 2.0}, step)
    assert steps_of(server.address, again) == list(range(10, 3000, 10))
    assert client.get_run(killed_id).data.tags["metrics_from_step"] == "2001"
    assert list((tmp_path / "checkpoints").iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 8 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder]).returncode:
        pytest.skip("only root may mount a disk")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(disk: Path) -> Path:
    path = disk / "filling"
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 4096)
        except OSError:
            return path


@pytest.mark.usefixtures("_slow_store")
def test_a_disk_that_is_full_and_has_room_again(
    config: MakeConfig, uri: str, small_disk: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With the database and the checkpoints on it."""
    shutil.move(tmp_path / "mlflow.db", small_disk)
    there = f"sqlite:///{small_disk}/mlflow.db"
    resolved = config(uri=there)
    checkpoint = resolved.checkpoint.model_copy(update={"directory": small_disk / "checkpoints"})
    with open_run(resolved.model_copy(update={"checkpoint": checkpoint}), enabled=True) as run:
        filling = fill(small_disk)
        for step in range(1, 301):
            run.log({f"m{i}": 1.0 for i in range(10)}, step)
        wait_until(lambda: any("waits in memory" in line for line in caplog.messages), PATIENCE_S, "a warning")
        wait_until(lambda: OUTAGE[0] in told(caplog), PATIENCE_S, "the other")
        filling.unlink()
    found = open_store(there, create=False)
    for key in ("m0", "m9"):
        assert [point.step for point in found.get_metric_history(run.id, key)] == list(range(1, 301))
    assert found.get_run(run.id).info.status == "FINISHED"
    assert len(told(caplog)) == 3


@pytest.fixture
def postgres(child_environment: dict[str, str]) -> Iterator[tuple[str, Callable[[str], None]]]:
    """The URI of a database that asks for a password, and what runs `pg_ctl` on its server."""
    found = [shutil.which("pg_ctl"), *map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl")))]
    tool = next((path for path in found if path is not None), None)
    if tool is None:
        pytest.skip("needs the system package postgresql")
    pytest.importorskip("psycopg2", reason="needs psycopg2-binary (the dev extra)")
    owner = "postgres" if os.geteuid() == 0 else None  # which refuses root
    # Not below pytest's folders, which nobody else may enter.
    with tempfile.TemporaryDirectory(prefix="postgres-", ignore_cleanup_errors=True) as name:
        folder, port = Path(name), free_port()
        if owner is not None:
            shutil.chown(folder, owner)

        def control(*arguments: str) -> None:
            done = subprocess.run(
                [tool, "--pgdata", folder / "data", *arguments], user=owner, cwd=folder, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stdout + done.stderr

        (folder / "password").write_text("secret")
        control("initdb", "--options", f"--auth scram-sha-256 --username me --pwfile {folder}/password --no-sync")
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"

        def act(action: str) -> None:
            if action == "start":
                control("start", "--wait", "--log", str(folder / "log"), "--options", options)
            else:
                control("stop", "--mode", "immediate")  # as if it had been killed

        act("start")
        try:
            yield f"postgresql+psycopg2://me:secret@127.0.0.1:{port}/postgres", act
        finally:
            act("stop")


@pytest.mark.usefixtures("_slow_store")
def test_postgres_is_killed_and_comes_back(
    postgres: tuple[str, Callable[[str], None]], config: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    there, act = postgres
    with open_run(config(uri=there), enabled=True) as run:
        run.log({"train/loss": 1.0, "nan": float("nan"), "inf": float("-inf")}, 1)
        client = open_store(there, create=False)
        wait_until(lambda: "nan" in client.get_run(run.id).data.metrics, PATIENCE_S, "the first metrics")
        act("stop")
        for step in range(2, 501):
            run.log({"train/loss": 1.0}, step)
        wait_until(lambda: OUTAGE[0] in told(caplog), PATIENCE_S, "a warning")
        on_disk = (unsent(run, tmp_path) / "records.jsonl").read_text()
        act("start")
    assert steps_of(there, run) == list(range(1, 501))
    found = open_store(there, create=False).get_run(run.id)
    assert found.info.status == "FINISHED"
    assert found.data.metrics["nan"] != found.data.metrics["nan"]
    assert found.data.metrics["inf"] < -1e308
    assert told(caplog) == OUTAGE
    assert "secret" not in on_disk + caplog.text + str(found.to_dictionary())


SIXTEEN = """
import os, sys
from pathlib import Path
from ssam_scale.config.schema import Config
from ssam_scale.tracking import run as tracking, spool
from ssam_scale.tracking.trackers import mlflow as tracker
import mlflow, mlflow.store.tracking.sqlalchemy_store, mlflow.tracking.client

tracker.CLOSE_WITHIN_S = spool.ANSWER_WITHIN_S = 600.0  # sixteen at once take longer than a run that ends may wait
config = Config.model_validate_json(Path(sys.argv[1]).read_text())
children = []
for number in range(16):
    if (child := os.fork()) == 0:
        code = 1
        try:
            with tracking.open_run(config, enabled=True) as run:
                for step in range(1, 51):
                    run.log({f"m{i}": 1.0 for i in range(20)}, step)
            code = 0
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    children.append(child)
sys.exit(sum(os.waitpid(child, 0)[1] != 0 for child in children))
"""


def test_sixteen_jobs_begin_with_one_new_database(
    config: MakeConfig, tmp_path: Path, child_environment: dict[str, str]
) -> None:
    """They are forks of one process, because to import MLflow sixteen times takes longer than all else."""
    uri = f"sqlite:///{tmp_path}/new/runs.db"
    (tmp_path / "config.json").write_text(config(uri=uri).model_dump_json())
    done = subprocess.run(
        [sys.executable, "-c", SIXTEEN, tmp_path / "config.json"],
        capture_output=True,
        text=True,
        env=child_environment,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    client = open_store(uri, create=False)
    runs: list[Any] = client.search_runs([client.get_experiment_by_name("ssam_scale").experiment_id])
    assert [run.info.status for run in runs] == ["FINISHED"] * 16
    for run in runs:
        assert [point.step for point in client.get_metric_history(run.info.run_id, "m19")] == list(range(1, 51))
    assert not list((tmp_path / "checkpoints").glob("unsent_*"))
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL

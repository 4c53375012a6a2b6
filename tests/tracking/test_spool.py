"""What waits on its way to MLflow, in real stores of MLflow that fail when they are told to."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import RestException

from ssam_scale.config.schema import Config
from ssam_scale.errors import UserError
from ssam_scale.tracking.run import open_run
from ssam_scale.tracking.spool import Writer, send, waiting_text
from ssam_scale.tracking.store import absolute, open_store
from tests.support.processes import run, wait_until

MakeConfig = Callable[..., Config]


class Client(MlflowClient):
    """MLflow's, which fails as told: before or after a request is carried out. It never scans a history."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.before: Iterator[Any] = iter(())
        self.after: Iterator[Any] = iter(())
        self.batches: list[int] = []

    def log_batch(self, run_id: str, metrics: Any = (), params: Any = (), tags: Any = (), **kwargs: Any) -> Any:
        if (error := next(self.before, None)) is not None:
            raise error
        self.batches.append(len(metrics))
        super().log_batch(run_id, metrics, params, tags, **kwargs)
        if (error := next(self.after, None)) is not None:
            raise error

    def get_metric_history(self, *args: Any) -> Any:
        raise AssertionError("a history may have a million points")


GONE = ConnectionError("refused\nand a long story")


@pytest.fixture(params=["database", "folder"])
def client(request: pytest.FixtureRequest, uri: str, tmp_path: Path) -> Client:
    """On a database, which ignores a point that it has; and on a folder, which takes all."""
    chosen = uri if request.param == "database" else f"file:{tmp_path}/mlruns"
    open_store(chosen, create=True)
    return Client(chosen)


@pytest.fixture
def run_id(client: Client) -> str:
    return str(client.create_run("0").info.run_id)


@pytest.fixture
def writer(client: Client, run_id: str, tmp_path: Path) -> Writer:
    return Writer(client, run_id, client.tracking_uri, tmp_path / "unsent")


def end(writer: Writer, timeout: float = 60.0) -> bool:
    return writer.close("FINISHED", "", timeout)


def history(client: Client, run_id: str, key: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in MlflowClient.get_metric_history(client, run_id, key)]


def test_everything_is_sent_in_order_and_nothing_stays_on_disk(
    client: Client, run_id: str, writer: Writer, tmp_path: Path
) -> None:
    for step in range(1, 5):
        writer.log({f"m{i}": float(step) for i in range(400)}, step)
    writer.tag("words", "x" * 10_000)
    (tmp_path / "table.csv").write_text("1,2")
    writer.artifact(tmp_path / "table.csv", "a/b")
    end(writer)
    assert max(client.batches) <= 1000
    assert sum(client.batches) == 1600
    assert history(client, run_id, "m7") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
    assert len(client.get_run(run_id).data.tags["words"]) == 8000
    assert [found.path for found in client.list_artifacts(run_id, "a/b")] == ["a/b/table.csv"]
    assert not (tmp_path / "unsent").exists()


def test_recording_does_not_wait_for_the_store_and_is_on_disk_meanwhile(
    client: Client, run_id: str, writer: Writer, tmp_path: Path
) -> None:
    release = threading.Event()
    client.before = iter(lambda: None if release.wait(60) else GONE, 0)
    for step in range(1, 4):  # would not come to an end if it waited: nobody has released the store
        writer.log({"a": 1.0}, step)
    records = tmp_path / "unsent" / "records.jsonl"
    wait_until(lambda: records.exists() and records.read_bytes().count(b"\n") == 4, 60, "three records")
    release.set()
    end(writer)
    assert len(history(client, run_id, "a")) == 3


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_outage_loses_nothing_repeats_nothing_and_is_told_once(
    client: Client, run_id: str, writer: Writer, caplog: pytest.LogCaptureFixture, tmp_path: Path, when: str
) -> None:
    setattr(client, when, iter([GONE, GONE]))
    for step in range(1, 4):
        writer.log({"a": float(step), "b": math.nan}, step)
    end(writer)
    assert history(client, run_id, "a") == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert len(history(client, run_id, "b")) == 3
    assert caplog.messages == [
        f"tracking store does not answer, what is recorded waits in {tmp_path}/unsent: refused",
        "tracking store answers again, and has all that waited",
    ]


def test_half_of_a_batch_that_arrived_is_not_repeated(client: Client, run_id: str, writer: Writer) -> None:
    """As a folder's store leaves it when the disk is full in the middle."""
    whole = client.log_batch
    cut = iter([True])

    def half(run_id: str, metrics: Any = (), **kwargs: Any) -> None:
        if next(cut, False):
            whole(run_id, metrics=metrics[: len(metrics) // 2], **kwargs)
            raise OSError("No space left on device")
        whole(run_id, metrics=metrics, **kwargs)

    client.log_batch = half  # type: ignore[method-assign]
    for step in range(1, 8):
        writer.log({"a": float(step), "b": 1.0, "c": 2.0}, step)
    end(writer)
    for key in "abc":
        assert [step for step, _ in history(client, run_id, key)] == [1, 2, 3, 4, 5, 6, 7]


def test_what_is_refused_is_left_out_and_named_and_the_rest_arrives(
    client: Client, run_id: str, writer: Writer, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2):
        writer.log({"good": 1.0, "../bad": 2.0, "better": 3.0}, step)
    end(writer)
    assert client.get_run(run_id).data.metrics == {"good": 1.0, "better": 3.0}
    (message,) = caplog.messages
    assert message.startswith("tracking store refuses ../bad, which is left out: Invalid")


def test_a_login_that_is_refused_is_an_outage(client: Client, run_id: str, writer: Writer) -> None:
    client.before = iter([RestException({"error_code": "UNAUTHENTICATED", "message": "expired"})])
    writer.log({"a": 1.0}, 1)
    end(writer)
    assert history(client, run_id, "a") == [(1, 1.0)]


def test_what_is_left_is_said_and_sent_by_the_command(
    client: Client, run_id: str, writer: Writer, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    client.before = iter(lambda: GONE, 0)
    writer.log({"a": 1.0, "b": math.inf}, 1)
    wait_until(lambda: bool(caplog.messages), 60, "a warning")
    (tmp_path / "table.csv").write_text("1")
    writer.artifact(tmp_path / "table.csv")
    end(writer, 0.2)
    told = caplog.messages[-1]
    assert told == (
        f"2 metrics, 1 tag, 1 artifact, its end (FINISHED) of run {run_id} did not reach the tracking store; they are "
        f"sent when it is resumed, or by: ssam-scale send {tmp_path}/unsent"
    )
    assert client.get_run(run_id).info.status == "RUNNING"
    assert waiting_text(tmp_path / "unsent", "table.csv") == "1"
    assert waiting_text(tmp_path / "unsent", "other.csv") is None
    done = send(Path(told.split()[-1]))
    assert done.startswith("2 metrics, 1 tag, 1 artifact, its end (FINISHED) sent to run ")
    found = client.get_run(run_id)
    assert (found.info.status, set(found.data.metrics)) == ("FINISHED", {"a", "b"})
    assert [each.path for each in client.list_artifacts(run_id)] == ["table.csv"]
    assert not (tmp_path / "unsent").exists()
    with pytest.raises(UserError, match="nothing waits there"):
        send(tmp_path / "unsent")


def test_what_a_killed_process_left_is_sent_once_whatever_had_arrived(
    client: Client, run_id: str, writer: Writer, tmp_path: Path
) -> None:
    client.after = iter([GONE] * 100)
    for step in range(1, 2501):
        writer.log({"a": float(step)}, step)
    wait_until(lambda: bool(history(client, run_id, "a")), 60, "some of it in the store")
    end(writer, 0.2)
    writer._sender.join(60)  # a process that is killed does not go on with the request that it was about
    arrived = len(history(client, run_id, "a"))
    assert 0 < arrived < 2500
    shutil.copytree(tmp_path / "unsent", tmp_path / "killed")
    with (tmp_path / "killed" / "records.jsonl").open("ab") as file:
        file.write(b'{"metrics":{"a":')  # a line that was being written
    send(tmp_path / "killed", client.tracking_uri)
    assert [step for step, _ in history(client, run_id, "a")] == list(range(1, 2501))


def test_a_disk_that_takes_nothing_leaves_the_memory(
    client: Client, run_id: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    writer = Writer(client, run_id, client.tracking_uri, tmp_path / "file" / "unsent")
    client.before = iter([GONE])
    for step in range(1, 4):
        writer.log({"a": 1.0}, step)
    with pytest.raises(OSError, match="file"):
        writer.artifact(tmp_path / "file")
    end(writer)
    assert len(history(client, run_id, "a")) == 3
    assert "waits in memory, 10000 records at most" in caplog.text
    lost = Writer(client, run_id, client.tracking_uri, tmp_path / "file" / "unsent")
    client.before = iter(lambda: GONE, 0)
    lost.log({"a": 1.0}, 4)
    end(lost, 0.2)
    assert caplog.messages[-1] == "2 records were lost: neither the tracking store nor the disk took them"


@pytest.mark.slow  # it starts the command
@pytest.mark.parametrize("client", ["database"], indirect=True)
def test_only_one_process_sends(
    client: Client, run_id: str, writer: Writer, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    client.before = iter(lambda: GONE, 0)
    writer.log({"a": 1.0}, 1)
    # The file is not opened here: a process that closes it loses its lock.
    wait_until(lambda: bool(caplog.messages), 60, "a warning")
    command = [sys.executable, "-m", "ssam_scale", "send", tmp_path / "unsent"]
    done = run(command, cwd=tmp_path, env={"PYTHONPATH": os.pathsep.join(sys.path)})
    assert done.returncode == 2
    problem = f"run {run_id} is being recorded or sent from there by another process"
    assert done.stdout.splitlines()[-1].endswith(f"{tmp_path}/unsent: {problem}")
    assert "memory" not in done.stdout
    end(writer, 0.2)


def test_no_number_stays_what_it_was(client: Client, run_id: str, writer: Writer, tmp_path: Path) -> None:
    client.before = iter([GONE] * 2)
    writer.log({"nan": math.nan, "high": math.inf, "low": -math.inf, "finite": 1.0}, 3)
    records = tmp_path / "unsent" / "records.jsonl"
    wait_until(lambda: records.exists() and records.read_bytes().count(b"\n") == 3, 60, "the records")
    kept = json.loads(records.read_text().splitlines()[1], parse_constant=pytest.fail)["metrics"]
    assert kept == {"nan": "nan", "high": "inf", "low": "-inf", "finite": 1.0}
    end(writer)
    found = client.get_run(run_id).data
    assert math.isnan(found.metrics["nan"])
    assert found.metrics["high"] >= 1.7976931348623157e308  # a database's infinity
    assert found.metrics["low"] <= -1.7976931348623157e308
    assert found.tags["not_finite"] == "nan nan at step 3, high inf at step 3, low -inf at step 3"


def test_a_run_that_goes_back_to_an_older_checkpoint_has_no_double_points(
    config: MakeConfig, client: Client, tmp_path: Path
) -> None:
    resolved = config(uri=client.tracking_uri)
    with open_run(resolved, enabled=True) as first:
        first.log({"summary/x": 1.0, "summary/y": math.nan}, 0)
        for step in range(10, 60, 10):
            first.log({"train/loss": float(step)}, step)
        first.log({"val/top1": 20.0}, 20)
    # What waits on disk counts as recorded.
    left = Writer(client, str(first.id), client.tracking_uri, tmp_path / "checkpoints" / f"unsent_{first.id}")
    client.before = iter(lambda: GONE, 0)
    left.log({"train/loss": 60.0}, 60)
    end(left, 0.2)
    with open_run(resolved, enabled=True, resume_run_id=first.id) as second:
        for step in range(30, 90, 10):
            second.log({"train/loss": -1.0}, step)
        second.log({"val/top1": 40.0}, 40)  # which the first had not come to
        second.log({"summary/x": 2.0, "summary/z": math.inf}, 0)
    assert first.id == second.id
    losses = [(10, 10.0), (20, 20.0), (30, 30.0), (40, 40.0), (50, 50.0), (60, 60.0), (70, -1.0), (80, -1.0)]
    assert history(client, str(first.id), "train/loss") == losses
    assert history(client, str(first.id), "val/top1") == [(20, 20.0), (40, 40.0)]
    found = client.get_run(str(first.id))
    assert found.data.metrics["summary/x"] == 2.0
    assert (found.data.tags["metrics_from_step"], found.info.status) == ("61", "FINISHED")
    assert found.data.tags["not_finite"] == "summary/y nan at step 0, summary/z inf at step 0"


def test_no_password_is_on_disk(client: Client, run_id: str, tmp_path: Path) -> None:
    writer = Writer(client, run_id, "http://me:secret@127.0.0.1:9", tmp_path / "unsent")
    client.before = iter(lambda: ConnectionError("http://me:secret@127.0.0.1:9 is down"), 0)
    writer.log({"a": 1.0}, 1)
    end(writer, 0.2)
    assert "secret" not in (tmp_path / "unsent" / "records.jsonl").read_text()
    with pytest.raises(UserError, match=r"http://me:\*\*\*@127.0.0.1:9, of which no password is kept"):
        send(tmp_path / "unsent")
    send(tmp_path / "unsent", client.tracking_uri)
    assert history(client, run_id, "a") == [(1, 1.0)]


def test_a_run_that_was_deleted_waits_to_be_restored(
    client: Client, run_id: str, writer: Writer, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    client.delete_run(run_id)
    writer.log({"a": 1.0}, 1)
    end(writer, 1.0)
    assert f"run {run_id} was deleted" in caplog.text
    client.restore_run(run_id)
    send(tmp_path / "unsent")
    assert history(client, run_id, "a") == [(1, 1.0)]


def test_a_relative_store_is_found_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute("sqlite:///runs/a.db?timeout=3") == f"sqlite:///{tmp_path}/runs/a.db?timeout=3"
    assert absolute("file:my runs") == f"file://{tmp_path}/my%20runs"
    assert absolute("mlruns") == f"file://{tmp_path}/mlruns"
    for same in (f"sqlite:///{tmp_path}/a.db", "http://h:5000", "postgresql://h/db"):
        assert absolute(same) == same

"""How runs end whose tracking store fails in the last moment, in every way that a network knows; and what comes of it.

The runs are real processes, and the store is a real MLflow server behind a gateway that fails when it is told to. No
test looks at a clock: a store that is not given up would hold a run for longer than any of them waits.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from ssam_scale.config.schema import Config
from ssam_scale.errors import UserError
from ssam_scale.tracking import spool
from ssam_scale.tracking.run import open_run
from ssam_scale.tracking.spool import send
from ssam_scale.tracking.store import ANSWER_WITHIN_S, open_store
from ssam_scale.tracking.watchdog import _sent
from tests.support.gateway import Fault, Gateway
from tests.support.mlflow_server import MLflowServer
from tests.support.processes import wait_until
from tests.support.senders import end_senders, senders
from tests.support.stores import put_store

pytestmark = pytest.mark.slow

MakeConfig = Callable[..., Config]

# Importing MLflow takes seconds, more on a loaded machine. An answer that comes byte by byte would take a day.
PATIENCE_S = 600

ENDS = {"complete": "FINISHED", "failure": "FAILED", "SIGTERM": "KILLED", "ctrl-c": "KILLED"}
STEPS = 250

HOLDS = """
import fcntl, sys
with open(sys.argv[1], "r+b") as file:
    fcntl.lockf(file, fcntl.LOCK_EX)
    print("held", flush=True)
    sys.stdin.read()
"""
RUNS = """
import os, signal, sys
from pathlib import Path
from ssam_scale.config.schema import Config
from ssam_scale.tracking import run as tracking
import mlflow, mlflow.store.tracking.rest_store

children = []
for number, words in enumerate(sys.argv[1:]):
    end, config = words.split(":", 1)
    began, go_on = os.pipe(), os.pipe()
    if (child := os.fork()) == 0:
        try:
            with tracking.open_run(Config.model_validate_json(Path(config).read_text()), enabled=True) as run:
                run.log({f"m{i}": 1.0 for i in range(20)}, 1)
                os.write(began[1], run.id.encode())
                os.read(go_on[0], 1)
                for step in range(2, STEPS + 1):
                    run.log({f"m{i}": float(step) for i in range(20)}, step)
                run.log_text("words", "a/text.txt")
                if end == "failure":
                    raise ValueError("as told")
                if end == "SIGTERM":
                    os.kill(os.getpid(), signal.SIGTERM)
                    signal.pause()
                if end == "ctrl-c":
                    raise KeyboardInterrupt
        finally:
            os._exit(0)  # by an exception, too
    print(os.read(began[0], 100).decode(), flush=True)
    children.append((child, go_on[1]))
sys.stdin.readline()
for child, go_on in children:
    os.write(go_on, b"x")
for child, _ in children:
    os.waitpid(child, 0)
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MLflowServer]:
    """Over a database, with artifacts that pass through it."""
    folder = tmp_path_factory.mktemp("server")
    put_store(folder / "mlflow.db")
    with MLflowServer(f"sqlite:///{folder}/mlflow.db", folder / "log", folder / "artifacts") as running:
        yield running


def histories(uri: str, run_id: str, keys: tuple[str, ...] = ("m0", "m19")) -> list[list[int]]:
    """Steps of metrics, as often as the store has them."""
    client = open_store(uri, create=False)
    return [[point.step for point in client.get_metric_history(run_id, key)] for key in keys]


def unsent(folder: Path, run_id: str) -> Path:
    return folder / "checkpoints" / f"unsent_{run_id}"


def test_a_store_is_given_up_within_ten_seconds() -> None:
    assert ANSWER_WITHIN_S < spool.CLOSE_WITHIN_S <= 10.0


# A request that was carried out, and whose answer is lost, is the one that may be sent twice.
SOME: list[tuple[Fault, int, str]] = [
    ("silent", 0, "complete"),
    ("lost", 0, "SIGTERM"),
    ("error", 0, "complete"),
    ("reset", 2, "failure"),
    ("drip", 0, "ctrl-c"),
    ("lost", 2, "complete"),
]
ALL: list[tuple[Fault, int, str]] = [
    (fault, after, end) for fault in ("silent", "lost", "error", "reset", "drip") for after in (0, 3) for end in ENDS
]


@pytest.mark.parametrize(
    "cases", [pytest.param(SOME, id="some"), pytest.param(ALL, id="all", marks=pytest.mark.exhaustive)]
)
def test_runs_end_whatever_their_store_does_and_nothing_is_lost_or_sent_twice(
    cases: list[tuple[Fault, int, str]],
    server: MLflowServer,
    config: MakeConfig,
    tmp_path: Path,
    child_environment: dict[str, str],
) -> None:
    """Each behind a gateway of its own, which fails in the way of the case after so many requests."""
    with ExitStack() as stack:
        gateways = [stack.enter_context(Gateway(server.address)) for _ in cases]
        words = []
        for number, ((_, _, end), gateway) in enumerate(zip(cases, gateways, strict=True)):
            file = tmp_path / f"{number}.json"
            file.write_text(config(uri=gateway.address).model_dump_json())
            words.append(f"{end}:{file}")
        process = subprocess.Popen(
            [sys.executable, "-c", RUNS.replace("STEPS", str(STEPS)), *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=child_environment,
        )
        try:
            assert process.stdout is not None
            run_ids = [process.stdout.readline().strip() for _ in cases]
            for (fault, after, _), gateway in zip(cases, gateways, strict=True):
                gateway.after, gateway.fault = after, fault
            _, said = process.communicate("go on\n", timeout=PATIENCE_S)  # while no store answers
        finally:
            process.kill()
            process.communicate()
        for run_id in run_ids:
            assert f"of run {run_id} did not reach the tracking store" in said
            assert unsent(tmp_path, run_id).exists()
        for gateway in gateways:
            gateway.fault = None
        # Some by a person, who may be quicker than the process that is left to do it.
        for run_id in run_ids[::2]:
            with suppress(UserError):
                send(unsent(tmp_path, run_id), server.address)
        wait_until(lambda: not list((tmp_path / "checkpoints").iterdir()), PATIENCE_S, "all of them sent")
    client = open_store(server.address, create=False)
    for (fault, after, end), run_id in zip(cases, run_ids, strict=True):
        assert histories(server.address, run_id) == [list(range(1, STEPS + 1))] * 2, (fault, after, end)
        run = client.get_run(run_id)
        assert run.info.status == ENDS[end], (fault, after, end)
        failure = {"complete": None, "failure": "ValueError: as told", "ctrl-c": "SIGINT"}.get(end, end)
        assert run.data.tags.get("failure") == failure
        assert [each.path for each in client.list_artifacts(run_id, "a")] == ["a/text.txt"]


def test_a_run_goes_on_while_another_process_sends_what_it_had_left(
    server: MLflowServer, config: MakeConfig, tmp_path: Path, child_environment: dict[str, str]
) -> None:
    """`ssam-scale send` is in the middle of a request when the run is resumed, which takes steps again."""
    with Gateway(server.address) as gateway:
        with open_run(config(uri=gateway.address), enabled=True) as first:
            gateway.fault = "reset"
            for step in range(1, 101):
                first.log({"m0": float(step), "m19": 1.0}, step)
        waits = unsent(tmp_path, str(first.id))
        assert waits.exists()
        end_sender(waits)
        gateway.fault, gateway.after = "late", 4  # the request after those that ask for the run
        failed = gateway.failed
        sender = subprocess.Popen(
            [sys.executable, "-m", "ssam_scale", "send", waits, "--uri", gateway.address],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=child_environment | {"MLFLOW_HTTP_REQUEST_TIMEOUT": str(PATIENCE_S)},
        )
        try:
            wait_until(lambda: gateway.failed > failed, PATIENCE_S, "a request that waits")
            # Whenever that is: before the run is resumed, this shows less.
            release = threading.Timer(3.0, lambda: setattr(gateway, "fault", None))
            release.start()
            with open_run(config(uri=server.address), enabled=True, resume_run_id=first.id) as again:
                for step in range(51, 151):
                    again.log({"m0": -1.0, "m19": -1.0}, step)
            said, _ = sender.communicate(timeout=PATIENCE_S)
        finally:
            sender.kill()
            sender.communicate()
    assert (again.id, sender.returncode) == (first.id, 0), said
    assert histories(server.address, str(first.id)) == [list(range(1, 151))] * 2
    run = open_store(server.address, create=False).get_run(str(first.id))
    assert (run.info.status, run.data.tags["metrics_from_step"]) == ("FINISHED", "101")
    assert not waits.exists()
    with pytest.raises(UserError, match="nothing waits there"):
        send(waits, server.address)


def test_who_is_left_to_send_does_not_leave_it_to_another_that_fails(
    server: MLflowServer, config: MakeConfig, tmp_path: Path, child_environment: dict[str, str]
) -> None:
    """Somebody had the file when the process came to it, and ended with a part sent: then nobody was left to do it."""
    with Gateway(server.address) as gateway:
        with open_run(config(uri=gateway.address), enabled=True) as run:
            gateway.fault = "reset"
            run.log({"m0": 1.0, "m19": 1.0}, 1)
        waits = unsent(tmp_path, str(run.id))
        end_sender(waits)
        holder = subprocess.Popen(
            [sys.executable, "-c", HOLDS, waits / "records.jsonl"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"held\n"
            with pytest.raises(UserError, match="is being recorded or sent from there by another process"):
                send(waits, server.address)
            assert not _sent(server.address, waits)  # and so it tries again
        finally:
            holder.kill()
            holder.communicate()
        assert _sent(server.address, waits)
    assert histories(server.address, str(run.id)) == [[1], [1]]
    assert not waits.exists()


def test_an_end_that_comes_late_does_not_end_the_run_that_goes_on(
    server: MLflowServer, config: MakeConfig, tmp_path: Path
) -> None:
    """From a copy of the folder, as on another machine whose disk is another."""
    with Gateway(server.address) as gateway:
        with open_run(config(uri=gateway.address), enabled=True) as first:
            gateway.fault = "reset"
            first.log({"m0": 1.0}, 1)
        waits = unsent(tmp_path, str(first.id))
        end_sender(waits)
        elsewhere = tmp_path / "elsewhere" / waits.name
        elsewhere.parent.mkdir()
        waits.rename(elsewhere)
        gateway.fault = None  # MLflow remembers by which address it has reached a run's artifacts
        client = open_store(server.address, create=False)
        with open_run(config(uri=server.address), enabled=True, resume_run_id=first.id):
            client.set_tag(first.id, "process", "another:1")
            send(elsewhere, server.address)
            assert client.get_run(first.id).info.status == "RUNNING"
            client.delete_tag(first.id, "process")
        assert client.get_run(first.id).info.status == "FINISHED"


@pytest.mark.parametrize("fault", ["silent", "error", "reset", "drip"])
def test_a_run_does_not_begin_without_its_store(fault: Fault, config: MakeConfig, tmp_path: Path) -> None:
    with Gateway(fault=fault) as gateway:
        begins: Any = open_run(config(uri=gateway.address), enabled=True)
        with pytest.raises(UserError, match="no MLflow server answers"), begins:
            pytest.fail("it has begun")
        assert not (tmp_path / "checkpoints").exists()


def end_sender(waits: Path) -> None:
    """End the process that a run has left to send what waits."""
    wait_until(lambda: bool(senders(waits)), PATIENCE_S, "a process that sends")
    end_senders(waits)
    wait_until(lambda: not senders(waits), PATIENCE_S, "its end")

"""How a run is marked when its process ends, proven on real processes that are really signalled."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ssam_scale.config.schema import Config
from ssam_scale.tracking.store import open_store
from tests.support.processes import free_port

pytestmark = pytest.mark.slow

MakeConfig = Callable[..., Config]

# Importing MLflow takes seconds, more on a loaded machine; nothing here tests speed.
PATIENCE_S = 120

PROGRAM = """
import ctypes, os, sys, threading, time
from pathlib import Path
from ssam_scale.config.schema import Config
from ssam_scale.tracking import shutdown
from ssam_scale.tracking.run import open_run

config = Config.model_validate_json(Path(sys.argv[1]).read_text())
folder = Path(sys.argv[1]).parent
rank = int(os.environ.get("RANK", "0"))

def ready(run):
    run.log({"train/loss": 1.0}, step=1)
    (folder / f"ready{rank}").write_text(run.id or "")

def wait():
    while True:
        time.sleep(0.05)

try:
    with open_run(config, enabled=rank == 0) as run:
%s
finally:
    (folder / f"unwound{rank}").touch()
"""

WAIT = """
ready(run)
wait()
"""


def _heed_signals() -> None:
    """What runs in the background of a shell, or under nohup, has been told to ignore some of them."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


class Training:
    """A process that tracks a run."""

    def __init__(self, folder: Path, config: Config, body: str, environment: dict[str, str], *launcher: str) -> None:
        self.folder, self.uri = folder, config.tracking.uri
        (folder / "config.json").write_text(config.model_dump_json())
        (folder / "program.py").write_text(PROGRAM % textwrap.indent(textwrap.dedent(body), " " * 8))
        command = [sys.executable, *launcher, str(folder / "program.py"), str(folder / "config.json")]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=folder,
            preexec_fn=_heed_signals,
        )

    def run_id(self, rank: int = 0) -> str:
        """Wait until the training is under way."""
        path = self.folder / f"ready{rank}"
        self._until(lambda: path.exists() and (rank > 0 or path.read_text() != ""), alive=True)
        return path.read_text()

    def end(self) -> tuple[int, str, str]:
        """Exit code and output, once the process has ended."""
        out, err = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode, out, err

    def status(self, run_id: str, expected: str) -> dict[str, str]:
        """Tags of the run, once it has the expected status."""
        client = open_store(self.uri, create=False)
        self._until(lambda: client.get_run(run_id).info.status == expected)
        tags: dict[str, str] = client.get_run(run_id).data.tags
        return tags

    def unwound(self, rank: int = 0) -> bool:
        return (self.folder / f"unwound{rank}").exists()

    def _until(self, condition: Callable[[], bool], *, alive: bool = False) -> None:
        give_up = time.monotonic() + PATIENCE_S
        while not condition():
            if alive and self.process.poll() is not None and not condition():
                pytest.fail(f"the training ended early:\n{self.process.communicate()}")
            if time.monotonic() > give_up:
                pytest.fail(f"gave up waiting; exit code {self.process.poll()}")
            time.sleep(0.05)


@pytest.fixture
def train(config: MakeConfig, child_environment: dict[str, str], tmp_path: Path) -> Any:
    started: list[Training] = []

    def start(body: str, *launcher: str, **tracking: Any) -> Training:
        training = Training(tmp_path, config(**tracking), body, child_environment, *launcher)
        started.append(training)
        return training

    yield start
    for training in started:
        if training.process.poll() is None:
            training.process.kill()
            training.process.communicate()


Train = Callable[..., Training]


def watchers(run_id: str) -> list[str]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # a process that ended while we looked
            found.append(entry.read_text().replace("\0", " "))
    return [line for line in found if run_id in line]


@pytest.mark.parametrize(
    ("number", "code", "failure"),
    [(signal.SIGTERM, 143, "SIGTERM"), (signal.SIGHUP, 129, "SIGHUP"), (signal.SIGINT, -signal.SIGINT, "SIGINT")],
)
def test_a_signalled_run_unwinds_and_is_killed(train: Train, number: signal.Signals, code: int, failure: str) -> None:
    training = train(WAIT)
    run_id = training.run_id()
    training.process.send_signal(number)
    returned, out, err = training.end()
    assert returned == code
    assert training.unwound()
    assert training.status(run_id, "KILLED")["failure"] == failure
    # Nothing on the terminal: no migration chatter, no telemetry notice, no traceback but Python's own for Ctrl-C.
    assert out == ""
    assert err == "" or number == signal.SIGINT
    assert open_store(training.uri, create=False).get_run(run_id).data.metrics == {"train/loss": 1.0}
    assert watchers(run_id) == []


def test_a_second_signal_does_not_spoil_the_unwinding(train: Train) -> None:
    training = train(
        """
        try:
            ready(run)
            wait()
        finally:
            time.sleep(1)  # a checkpoint is being written
            (folder / "saved").touch()
        """
    )
    run_id = training.run_id()
    for _ in range(5):
        training.process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    assert training.end()[0] == 143
    assert (training.folder / "saved").exists()
    training.status(run_id, "KILLED")


def test_sigkill_leaves_no_run_that_seems_to_be_running(train: Train) -> None:
    training = train(WAIT)
    run_id = training.run_id()
    assert len(watchers(run_id)) == 1
    training.process.kill()
    assert training.end()[0] == -signal.SIGKILL
    assert not training.unwound()
    assert "SIGKILL" in training.status(run_id, "KILLED")["failure"]
    give_up = time.monotonic() + PATIENCE_S
    while watchers(run_id) and time.monotonic() < give_up:
        time.sleep(0.1)
    assert watchers(run_id) == []


def test_a_main_thread_stuck_in_native_code_is_marked_all_the_same(train: Train) -> None:
    training = train(
        """
        shutdown.STUCK_AFTER_S = 0.2
        ready(run)
        libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(256)
        libc.pthread_mutex_lock(mutex)
        libc.pthread_mutex_lock(mutex)  # for ever, and no signal interrupts it: like a collective without its peer
        """
    )
    run_id = training.run_id()
    time.sleep(0.5)  # from `ready` into the lock; too short only makes the test weaker
    training.process.terminate()
    assert training.status(run_id, "KILLED")["failure"] == "SIGTERM"
    assert training.process.poll() is None


def test_an_exception_fails_the_run_and_keeps_its_traceback(train: Train) -> None:
    training = train('ready(run)\nraise ValueError("bad batch")')
    code, _, err = training.end()
    assert code == 1
    assert "ValueError: bad batch" in err
    assert training.status(training.run_id(), "FAILED")["failure"] == "ValueError: bad batch"


def test_success_on_a_new_database_says_nothing(train: Train, tmp_path: Path) -> None:
    training = train("ready(run)", uri=f"sqlite:///{tmp_path}/new/runs.db")
    assert training.end() == (0, "", "")
    training.status(training.run_id(), "FINISHED")
    assert (tmp_path / "new" / "mlartifacts" / "ssam_scale").is_dir()


def test_telemetry_is_off_and_ranks_that_do_not_track_never_import_mlflow(
    train: Train, config: MakeConfig, tmp_path: Path, child_environment: dict[str, str]
) -> None:
    training = train(
        "from mlflow.telemetry.utils import is_telemetry_disabled as off\nfrom mlflow.telemetry import client\n"
        "print(off(), client._MLFLOW_TELEMETRY_CLIENT)"
    )
    assert training.end() == (0, "True None\n", "")
    child_environment["RANK"] = "1"
    silent = Training(
        tmp_path, config(), "import ssam_scale\nprint('mlflow' in sys.modules, run.id)", child_environment
    )
    assert silent.end() == (0, "False None\n", "")


def test_a_rank_that_does_not_track_unwinds_too(train: Train, child_environment: dict[str, str]) -> None:
    child_environment["RANK"] = "1"
    training = train(WAIT)
    training.run_id(rank=1)
    training.process.terminate()
    assert training.end() == (143, "", "")
    assert training.unwound(1)


JOIN = """
import torch, torch.distributed as dist
dist.init_process_group("gloo")
"""


def torchrun() -> tuple[str, ...]:
    return ("-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}")


def test_terminating_torchrun_kills_the_run(train: Train) -> None:
    training = train(
        JOIN + "ready(run)\nwhile True:\n    dist.all_reduce(torch.ones(1))\n    time.sleep(0.01)", *torchrun()
    )
    run_id = training.run_id()
    training.run_id(rank=1)
    training.process.terminate()
    training.end()
    assert "SIGTERM" in training.status(run_id, "KILLED")["failure"]
    assert training.unwound(0)
    assert training.unwound(1)


def test_the_run_names_the_failure_of_another_rank(train: Train) -> None:
    """Rank 0 only sees a broken connection or the launcher's SIGTERM; the cause is on rank 1."""
    training = train(
        JOIN
        + """
ready(run)
dist.barrier()
if rank == 1:
    raise ValueError("truncated image")
dist.all_reduce(torch.ones(1))
""",
        *torchrun(),
    )
    run_id = training.run_id()
    assert training.end()[0] != 0
    assert training.status(run_id, "FAILED")["failure"] == "rank 1: ValueError: truncated image"

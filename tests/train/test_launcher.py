"""Ranks whose launcher was killed end as well: really started, really killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.support.checkout import ROOT
from tests.support.processes import daemon, free_port, wait_until
from tests.support.runs import write_config
from tests.support.tiers import few

pytestmark = pytest.mark.slow

# On a loaded machine; nothing here tests speed.
PATIENCE_S = 240
LAUNCHERS = {
    "torchrun": ["--standalone", "--nproc_per_node", "2"],
    "deepspeed": ["--num_gpus", "2", "--master_port", "{port}"],
}


def children(pid: int) -> list[int]:
    """The processes that a process has started, and those that these have."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found += [child, *children(child)]
    return found


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def is_rank(pid: int) -> bool:
    """Whether it trains: the watchdog of a tracked run outlives it on purpose."""
    return "launch/train.py --config" in command_of(pid).replace("--local_rank=0 ", "").replace("--local_rank=1 ", "")


@pytest.mark.parametrize("launcher", few(LAUNCHERS, "torchrun"))
def test_ranks_end_with_a_launcher_that_is_killed(launcher: str, tmp_path: Path, data: Path) -> None:
    config = write_config(tmp_path / "run.yaml", data, train={"epochs": 100_000}, checkpoint={"every_epochs": 100_000})
    options = [option.format(port=free_port()) for option in LAUNCHERS[launcher]]
    command = [Path(sys.executable).parent / launcher, *options, ROOT / "launch/train.py", "--config", config]
    log = tmp_path / "log"
    with daemon(command, log, {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}) as process:
        wait_until(lambda: "step " in log.read_text(), PATIENCE_S, f"training under {launcher}:\n{log.read_text()}")
        below = children(process.pid)
        ranks = [pid for pid in below if is_rank(pid) and not any(is_rank(child) for child in children(pid))]
        assert len(ranks) == 2, [command_of(pid) for pid in below]
        for pid in [process.pid, *(pid for pid in below if set(ranks) & set(children(pid)))]:
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not any(map(is_rank, ranks)), PATIENCE_S, "the ranks have ended")
    assert "has ended; this ends, too" in log.read_text()


STUCK = """
import os, signal, time
from ssam_scale.launcher import ended_with_launcher

signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as deaf as one that waits in a collective
with ended_with_launcher(grace_s=0.5):
    open("started", "w").write(str(os.getpid()))
    time.sleep(3600)
"""


def orphaned(folder: Path, program: str, environment: dict[str, str]) -> None:
    """Run a program in a process of its own until it has made `started`, and let its parent end then."""
    (folder / "stuck.py").write_text(program)
    parent = """
        import os, subprocess, sys, time
        subprocess.Popen([sys.executable, "stuck.py"])
        while not os.path.exists("started"):
            time.sleep(0.1)
    """
    given = {**os.environ, **environment, "PYTHONPATH": str(ROOT)}
    if "RANK" not in environment:
        given.pop("RANK", None)
    subprocess.run([sys.executable, "-c", textwrap.dedent(parent)], cwd=folder, env=given, check=True)


def test_one_that_hears_no_signal_is_killed(tmp_path: Path) -> None:
    orphaned(tmp_path, STUCK, {"RANK": "0"})
    pid = int((tmp_path / "started").read_text())
    wait_until(lambda: "stuck.py" not in command_of(pid), PATIENCE_S, "it has ended")


def test_without_a_launcher_nothing_is_watched(tmp_path: Path) -> None:
    orphaned(tmp_path, STUCK.replace("time.sleep(3600)", "time.sleep(3)\n    open('done', 'w')"), {})
    wait_until((tmp_path / "done").exists, PATIENCE_S, "what nothing has ended")

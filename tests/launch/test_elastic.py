"""torchrun with `--nnodes 1:2` loses a node and goes on with the rest."""

from __future__ import annotations

import contextlib
import re
import sys
from pathlib import Path

import psutil
import pytest

from ssam_scale.train.checkpoint import newest
from ssam_scale.train.checkpoint.files import read_state
from tests.support.checkout import ROOT
from tests.support.processes import daemon, free_port, wait_until
from tests.support.runs import write_config, write_data

pytestmark = pytest.mark.exhaustive  # minutes, most of them waiting for one another

EPOCHS = 40


def agent(port: int) -> list[str | Path]:
    """One node's torchrun, which starts one process."""
    return [
        Path(sys.executable).parent / "torchrun",
        *("--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=3"),
        *("--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=elastic", "--local-addr=127.0.0.1"),
        ROOT / "launch" / "train.py",
    ]


def test_a_lost_node_is_made_up_for_by_more_micro_batches(tmp_path: Path) -> None:
    """The batch stays: as many steps in an epoch, of as many images, each once, and no larger micro-batches."""
    write_data(tmp_path)
    config = write_config(
        tmp_path / "run.yaml",
        tmp_path,
        train={"epochs": EPOCHS, "eval_epochs": EPOCHS},
        checkpoint={"every_steps": 3, "every_epochs": EPOCHS},
    )
    checkpoints, port = tmp_path / "checkpoints", free_port()
    logs = [tmp_path / "stays.log", tmp_path / "lost.log"]
    environment = {"OMP_NUM_THREADS": "1"}
    arguments = ["--config", config, "--resume", "auto"]
    with contextlib.ExitStack() as stack:
        # The first one has the store by which they meet.
        stays = stack.enter_context(daemon([*agent(port), *arguments], logs[0], environment))
        wait_until(lambda: _listens(stays.pid, port), 120, "the first agent's store")
        lost = stack.enter_context(daemon([*agent(port), *arguments], logs[1], environment))
        wait_until(lambda: newest(checkpoints) is not None, 300, f"a checkpoint\n{logs[0].read_text()}")
        for process in [*psutil.Process(lost.pid).children(recursive=True), psutil.Process(lost.pid)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        wait_until(lambda: stays.poll() is not None, 400, "the other goes on to the end")
    said = logs[0].read_text()
    assert stays.returncode == 0, said
    assert "on 2 processes of 2 nodes" in said
    assert "1 micro-batch of 6 images on each process" in said
    assert "on 1 process of 1 node" in said
    assert "2 micro-batches of 6 images on each process" in said
    assert (place := re.search(r"resumed from \S+/(epoch_\d+\S*) after epoch", said)), said
    assert place[1] < f"epoch_{EPOCHS:04d}"
    last = read_state(checkpoints / f"epoch_{EPOCHS:04d}")
    assert last["micro_batches"] == {"processes": 1, "accumulation": 2, "images": 6}
    assert last["parts"]["progress"]["step"] == EPOCHS * 4  # 48 images by 12


def _listens(pid: int, port: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return any(
            c.laddr and c.laddr.port == port and c.status == "LISTEN" for c in psutil.Process(pid).net_connections()
        )
    return False

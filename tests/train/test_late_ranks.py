"""A process that does not come, or is gone, is named by those that wait for it: real processes, really stopped."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ssam_scale.cli.main import main
from ssam_scale.data import ImageLoader
from ssam_scale.train import loop
from ssam_scale.train.build import build_hooks
from ssam_scale.train.evaluation import Evaluate
from ssam_scale.train.hooks import Hook
from tests.support.checkout import ROOT
from tests.support.processes import daemon, free_port, wait_until
from tests.support.ranks import start_fresh_rank
from tests.support.runs import VIT, write_config
from tests.support.tiers import few

pytestmark = pytest.mark.slow

PATIENCE_S = 240  # on a loaded machine; nothing here tests speed
# Longer than what one process does by itself in these runs (imports, building) on a loaded machine.
TIMEOUT_S = 25
ENDLESS: dict[str, Any] = {
    "model": VIT,
    "train": {"epochs": 100_000, "eval_epochs": 100_000},
    "checkpoint": {"every_epochs": 100_000, "every_minutes": None},
}
BACKENDS = ["ddp", "fsdp2", "zero0", "zero1", "zero2", "zero3"]
CLOCK = r"(?:\d{4}-\d\d-\d\d )?\d\d:\d\d:\d\d"


class Ranks:
    """Processes that train, each with a log."""

    def __init__(self, config: Path, size: int, function: Callable[..., Any], *args: Any, port: int = 0) -> None:
        port, self.logs = port or free_port(), [config.parent / f"{rank}.log" for rank in range(size)]
        command = ["train", "--config", str(config)]
        self.processes = [
            start_fresh_rank(rank, size, port, log, function, command, *args) for rank, log in enumerate(self.logs)
        ]

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def said(self) -> str:
        return "\n".join(f"--- {log.name}\n{log.read_text()}" for log in self.logs if log.exists())

    def wait_until_training(self) -> None:
        training = lambda: "step " in self.logs[0].read_text() if self.logs[0].exists() else False  # noqa: E731
        wait_until(training, PATIENCE_S, "training")

    def ended(self, *ranks: int) -> list[str]:
        """The errors of processes that must end by themselves, with exit code 1 and one line."""
        lines = []
        for rank in ranks:
            self.processes[rank].join(PATIENCE_S)
            said = self.logs[rank].read_text()
            assert self.processes[rank].exitcode == 1, self.said()
            assert "Traceback" not in said, said
            (line,) = [line for line in said.splitlines() if "error:" in line]
            lines.append(line)
        return lines


def configured(home: Path, data: Path, backend: str, **sections: Any) -> Path:
    sharding = {"backend": backend, "timeout_seconds": TIMEOUT_S}
    return write_config(home / "run.yaml", data, **{**ENDLESS, "sharding": sharding, **sections})


@pytest.mark.parametrize("backend", few(BACKENDS, "zero3"))
def test_a_stopped_process_is_named(backend: str, data: Path, home: Path) -> None:
    with Ranks(configured(home, data, backend), 3, main) as ranks:
        ranks.wait_until_training()
        os.kill(ranks.processes[2].pid, signal.SIGSTOP)
        first, second = ranks.ended(0, 1)
        assert (
            first.partition("error: ")[2].partition(" (the last")[0]
            == (second.partition("error: ")[2].partition(" (the last")[0])
        )
        stopped = (
            rf"rank 2 \(node {os.uname().nodename}\) has not come to .*: it is in .* since {CLOCK}, and has given no"
        )
        assert re.search(stopped, first), ranks.said()
        assert (home / "checkpoints/flight_recorder/rank_0").stat().st_size


def test_a_store_that_does_not_answer_is_named_by_its_host(data: Path, home: Path) -> None:
    """Of the processes that deepspeed starts, the first holds the store."""
    with Ranks(configured(home, data, "ddp"), 2, main) as ranks:
        ranks.wait_until_training()
        os.kill(ranks.processes[0].pid, signal.SIGSTOP)
        (line,) = ranks.ended(1)
        place = rf"rank 0 \(node {os.uname().nodename}\), which holds the store of the processes at 127.0.0.1:\d+,"
        assert re.search(rf"{place} does not answer: it is stopped or gone.*; it was in .* since {CLOCK}", line), line


KILLED = {signal.SIGKILL: "memory", signal.SIGBUS: "mapped file", signal.SIGSEGV: "compiled code"}


@pytest.mark.parametrize("number", few(KILLED, signal.SIGBUS), ids=lambda number: number.name)
def test_a_killed_process_is_named_with_its_signal(number: signal.Signals, data: Path, home: Path) -> None:
    """Under torchrun, which asks how a rank has ended ten times a second; who sits beside it, looks at once.

    At least one of those that are left says it: torchrun's SIGTERM may end another one before. And torchrun may be the
    first to ask where all cores are busy, after which nobody can say how: one of three times it must not be.
    """
    gone = rf"rank 2 \(node {os.uname().nodename}\) was killed by {number.name} \(.*{KILLED[number]}.*\), in "
    for attempt in range(3):
        said = killed(number, data, home / str(attempt))
        assert re.search(r"ssam-scale: process [01]: error: rank 2 \(node ", said), said
        assert said.index("ssam-scale: process") < said.index("ChildFailedError"), said  # before torchrun's own report
        if re.search(rf"ssam-scale: process [01]: error: {gone}", said):
            return
    pytest.fail(said)


def killed(number: signal.Signals, data: Path, home: Path) -> str:
    """What three processes print of which one is killed."""
    home.mkdir()
    config, log = configured(home, data, "ddp", sharding={}), home / "log"
    torchrun = [Path(sys.executable).parent / "torchrun", "--standalone", "--nproc_per_node", "3"]
    command = [*torchrun, ROOT / "launch/train.py", "--config", config]
    with daemon(command, log, {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}) as process:
        wait_until(lambda: "step " in log.read_text(), PATIENCE_S, "training")
        pids = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
        (third,) = [pid for pid in pids if b"\0RANK=2\0" in Path(f"/proc/{pid}/environ").read_bytes()]
        os.kill(third, number)
        process.wait(PATIENCE_S)
    return log.read_text()


def stuck_in_data_loading(arguments: list[str]) -> None:
    """Train, and let the second process wait for ever for the third batch."""
    plain = ImageLoader.__iter__

    def stuck(self: ImageLoader) -> Iterator[Any]:
        for number, batch in enumerate(plain(self)):
            if number == 2 and os.environ["RANK"] == "1":
                time.sleep(10 * PATIENCE_S)
            yield batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImageLoader, "__iter__", stuck)
        main(arguments)


@pytest.mark.parametrize("backend", few(BACKENDS, "fsdp2"))
def test_a_process_that_waits_for_its_data_is_named(backend: str, data: Path, home: Path) -> None:
    with Ranks(configured(home, data, backend), 2, stuck_in_data_loading) as ranks:
        (line,) = ranks.ended(0)
        late = rf"rank 1 \(node .*\) has not come to step 3: it is in data loading since {CLOCK}( |$)"
        assert re.search(late, line), line


class SleepsBetweenEpochs(Hook):
    """Lets the second process sleep after the first epoch, and tells the first all groups' time limits."""

    def between_epochs(self, progress: Any) -> None:
        for group in dist.distributed_c10d._world.pg_map:
            limit = group._get_backend(torch.device("cpu")).options._timeout
            assert limit.total_seconds() == TIMEOUT_S, group.group_desc
        if os.environ["RANK"] == "1":
            time.sleep(10 * PATIENCE_S)


def sleeping(arguments: list[str]) -> None:
    """Train with that hook before the evaluation."""

    def hooks(*args: Any) -> list[Hook]:
        every = build_hooks(*args)
        place = next(i for i, hook in enumerate(every) if isinstance(hook, Evaluate))
        return [*every[:place], SleepsBetweenEpochs(), *every[place:]]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "build_hooks", hooks)
        main(arguments)


@pytest.mark.parametrize("backend", few(BACKENDS, "zero3"))
def test_all_groups_have_the_time_limit_in_the_evaluation_too(backend: str, data: Path, home: Path) -> None:
    train = {**ENDLESS["train"], "eval_epochs": 1}
    with Ranks(configured(home, data, backend, train=train), 2, sleeping) as ranks:
        (line,) = ranks.ended(0)
        late = rf"rank 1 \(node .*\) has not come to evaluation at step 4: it is in SleepsBetweenEpochs since {CLOCK}"
        assert re.search(late, line), line


def slow_in_data_loading(arguments: list[str]) -> None:
    """Train, and let the second process sleep for each batch."""
    plain = ImageLoader.__iter__

    def slow(self: ImageLoader) -> Iterator[Any]:
        for batch in plain(self):
            time.sleep(0.3 if os.environ["RANK"] == "1" else 0.0)
            yield batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImageLoader, "__iter__", slow)
        main(arguments)


@pytest.mark.parametrize("backend", few(BACKENDS, "fsdp2"))
def test_a_straggler_is_warned_of_once(backend: str, data: Path, home: Path) -> None:
    train = {"epochs": 27, "eval_epochs": 27}
    sharding = {"backend": backend}
    config = configured(home, data, backend, sharding=sharding, train=train, tracking={"log_every": 4})
    with Ranks(config, 2, slow_in_data_loading) as ranks:
        for process in ranks.processes:
            process.join(PATIENCE_S)
            assert process.exitcode == 0, ranks.said()
        assert ranks.said().count(f"rank 1 (node {os.uname().nodename}) is slow: in 100 steps") == 1


@pytest.mark.parametrize("processes", [1, 2])
def test_a_file_that_becomes_shorter_is_named(processes: int, data: Path, home: Path) -> None:
    """SIGBUS otherwise: it is mapped."""
    for name in ("train", "val"):
        shutil.copy(data / f"{name}.beton", home)
        shutil.copy(data / f"{name}.beton.json", home)
    with Ranks(configured(home, home, "auto", sharding={}), processes, main) as ranks:
        ranks.wait_until_training()
        os.truncate(home / "train.beton", 4096)
        for process in ranks.processes:
            process.join(PATIENCE_S)
        said = ranks.said()
        assert f"{home}/train.beton: has become shorter while it was read, 4,096 bytes of" in said
        assert "Traceback" not in said
        assert {process.exitcode for process in ranks.processes} <= {1, 2}, said

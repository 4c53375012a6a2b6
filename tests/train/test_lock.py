"""One job at a time in a folder of checkpoints; and what is newest there is of the run that goes on."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest

from ssam_scale.errors import UserError
from ssam_scale.train import checkpoint
from ssam_scale.train.checkpoint.lock import NAME, FolderLock, Holder
from tests.support.processes import free_port, wait_until
from tests.support.ranks import start_fresh_rank


def hold(directory: Path, until: Path) -> None:
    """Holds the folder until a file appears."""
    lock = FolderLock(directory, "sam resnet50")
    lock.acquire()
    (directory / "held").touch()
    while not until.exists():
        time.sleep(0.01)
    lock.release()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.slow
def test_a_second_job_is_told_who_holds_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "a/b"
    process = start_fresh_rank(0, 1, free_port(), tmp_path / "log", hold, folder, tmp_path / "end")
    wait_until((folder / "held").exists, 60, "the other job")
    with pytest.raises(UserError) as refused:
        FolderLock(folder, "base vit").acquire()
    assert str(refused.value) == (
        f"checkpoint.directory {folder} is in use by process {process.pid} on {socket.gethostname()} (sam resnet50): "
        "wait for its end or end it, or choose another folder"
    )
    (tmp_path / "end").touch()
    process.join(60)
    lock = FolderLock(folder, "base vit")
    lock.acquire()
    lock.release()
    assert names(folder) == ["held"]


@pytest.mark.slow
def test_the_lock_of_a_process_that_was_killed_is_taken_over(tmp_path: Path) -> None:
    process = start_fresh_rank(0, 1, free_port(), tmp_path / "log", hold, tmp_path, tmp_path / "end")
    wait_until((tmp_path / "held").exists, 60, "the other job")
    process.kill()
    process.join()
    assert (tmp_path / NAME).exists()
    lock = FolderLock(tmp_path, "base vit")
    lock.acquire()
    assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()
    lock.release()


def test_the_lock_of_a_process_that_nobody_has_asked_for_its_exit_code_is_taken_over(tmp_path: Path) -> None:
    """As in a container whose first process is no init: what was killed there stays a zombie."""
    with subprocess.Popen(["sleep", "600"]) as process:
        try:
            there = {**vars(Holder.here("sam resnet50")), "pid": process.pid, "started": started(process.pid)}
            (tmp_path / NAME).write_text(json.dumps(there))
            with pytest.raises(UserError, match=f"in use by process {process.pid}"):
                FolderLock(tmp_path, "base vit").acquire()
        finally:
            process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and stays
        lock = FolderLock(tmp_path, "base vit")
        lock.acquire()
        lock.release()


def started(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


def elsewhere(folder: Path, **changes: object) -> Path:
    """The lock of a job on another host."""
    lock = folder / NAME
    there = {**vars(Holder.here("sam resnet50")), "host": "node7", "kernel": "another", "token": "theirs", **changes}
    lock.write_text(json.dumps(there))
    return lock


def test_a_holder_on_another_host_lives_as_long_as_it_renews_its_lock(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lock, ended = elsewhere(tmp_path), threading.Event()

    def live() -> None:
        while not ended.wait(0.02):
            os.utime(lock)

    heart = threading.Thread(target=live)
    heart.start()
    try:
        with pytest.raises(UserError, match=r"is in use by process \d+ on node7 \(sam resnet50\)"):
            FolderLock(tmp_path, "base vit", beat=0.1, stale=60.0).acquire()
    finally:
        ended.set()
        heart.join()
    assert lock.exists()
    mine = FolderLock(tmp_path, "base vit", beat=0.1, stale=0.5)
    mine.acquire()
    assert "waiting for a sign of life" in capsys.readouterr().out
    mine.release()
    assert names(tmp_path) == []


def test_an_old_lock_of_another_host_and_that_of_the_same_job_are_taken_over_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = elsewhere(tmp_path)
    os.utime(lock, (lock.stat().st_mtime - 1000, lock.stat().st_mtime - 1000))
    mine = FolderLock(tmp_path, "base vit")
    mine.acquire()
    mine.release()
    elsewhere(tmp_path, job="17", start=0)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    again = FolderLock(tmp_path, "base vit")
    again.acquire()
    again.release()
    lock.write_text("")  # of a file system without links, and of a host that was lost then
    os.utime(lock, (0, 0))
    last = FolderLock(tmp_path, "base vit")
    last.acquire()
    last.release()


def test_only_one_of_many_takes_over(tmp_path: Path) -> None:
    lock = elsewhere(tmp_path)
    os.utime(lock, (0, 0))
    locks = [FolderLock(tmp_path, f"run {n}") for n in range(8)]
    refused: list[UserError] = []
    start = threading.Barrier(len(locks))

    def race(one: FolderLock) -> None:
        start.wait()
        try:
            one.acquire()
        except UserError as error:
            refused.append(error)

    threads = [threading.Thread(target=race, args=(one,)) for one in locks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == len(locks) - 1
    for one in locks:
        one.release()
    assert names(tmp_path) == []


def test_folders_that_nothing_was_written_to_do_not_stay(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path / "a/b", "base vit")
    lock.acquire()
    lock.release()
    assert names(tmp_path) == []


def folders(directory: Path, *names: str) -> None:
    for name in names:
        (directory / name).mkdir(parents=True)


def test_later_checkpoints_of_a_branch_that_is_left_are_set_aside(tmp_path: Path) -> None:
    names = "epoch_0001", "epoch_0001_step_000150", "epoch_0002", "epoch_0010"
    folders(tmp_path, *names, "epoch_0002.superseded")
    aside = checkpoint.set_aside(tmp_path, tmp_path / "epoch_0001_step_000150")
    assert [path.name for path in aside] == ["epoch_0002.superseded.1", "epoch_0010.superseded"]
    assert checkpoint.newest(tmp_path) == tmp_path / "epoch_0001_step_000150"
    assert checkpoint.set_aside(tmp_path, tmp_path / "epoch_0001_step_000150") == []
    folders(tmp_path / "other", "epoch_0009")
    checkpoint.set_aside(tmp_path, tmp_path / "other/epoch_0009")
    assert checkpoint.newest(tmp_path) is None

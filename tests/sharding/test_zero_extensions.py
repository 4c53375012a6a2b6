"""What DeepSpeed compiles is compiled in sight, in a folder for its versions, and no lock is waited for without end."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from ssam_scale.errors import UserError
from ssam_scale.sharding.zero import extensions
from ssam_scale.sharding.zero.extensions import Baton, prepare_extensions

Start = Callable[[str], subprocess.Popen[str]]


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    folder = tmp_path / "an_op"
    folder.mkdir()
    return folder / "lock"


@pytest.fixture
def start(lock: Path) -> Iterator[Start]:
    """Starts a process that runs code, with `lock`, until it is killed; returns once it has printed a line."""
    processes = []

    def started(code: str) -> subprocess.Popen[str]:
        code = f"import sys, time; lock = sys.argv[1]; {code}; print('there', flush=True); time.sleep(600)"
        command = [sys.executable, "-c", code, str(lock)]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        assert processes[-1].stdout is not None
        while (line := processes[-1].stdout.readline()) != "there\n":
            assert line
        return processes[-1]

    yield started
    for process in processes:
        process.kill()
        process.communicate()


COMPILES = "from ssam_scale.sharding.zero.extensions import Baton; assert Baton(lock).try_acquire()"


@pytest.mark.slow
def test_a_lock_is_waited_for_with_a_bound_and_taken_over_from_the_dead(
    lock: Path, start: Start, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(extensions, "GIVE_UP_SECONDS", 0.6)
    other = start(COMPILES)
    with pytest.raises(UserError) as caught:
        Baton(str(lock)).try_acquire()
    assert f"{lock}: process {other.pid} on " in str(caught.value)
    assert "remove the file and start again" in str(caught.value)
    assert f"another process compiles an_op; waiting for it ({lock})" in capsys.readouterr().out
    other.kill()
    other.wait()
    mine = Baton(str(lock))
    assert mine.try_acquire()
    said = capsys.readouterr().out
    assert f"took over {lock}" in said
    assert f"an_op is compiled, once, in {lock.parent}" in said
    with pytest.raises(UserError, match=f"process {os.getpid()} on "):  # a lock that was taken over is one
        Baton(str(lock)).try_acquire()
    mine.release()
    assert not lock.exists()


def test_what_another_has_compiled_is_not_compiled_again(lock: Path) -> None:
    other = Baton(str(lock))
    assert other.try_acquire()
    threading.Timer(0.5, other.release).start()
    assert not Baton(str(lock)).try_acquire()
    assert not lock.exists()


def test_a_lock_of_torchs_own_is_stale_when_nobody_has_it_and_nothing_happens(
    lock: Path, start: Start, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(extensions, "GIVE_UP_SECONDS", 0.6)
    monkeypatch.setenv("LOCAL_RANK", "1")  # which says nothing
    lock.touch()
    long_ago = time.time() - 2 * extensions.STALE_SECONDS
    with pytest.raises(UserError, match="another process has held this lock"):  # it may have begun just now
        Baton(str(lock)).try_acquire()
    holder = start("import os; fd = os.open(lock, os.O_RDWR)")
    os.utime(lock, (long_ago, long_ago))
    with pytest.raises(UserError, match="another process has held this lock"):
        Baton(str(lock)).try_acquire()
    holder.kill()
    holder.wait()
    lock.write_text("process 1 on another-machine")
    with pytest.raises(UserError, match="process 1 on another-machine has held this lock"):
        Baton(str(lock)).try_acquire()
    lock.write_text("")
    os.utime(lock, (long_ago, long_ago))
    baton = Baton(str(lock))
    assert baton.try_acquire()
    baton.release()
    assert capsys.readouterr().out == ""


COMPILE = """
import sys
from torch.utils import cpp_extension
from ssam_scale.sharding.zero.extensions import prepare_extensions
prepare_extensions("0")
cpp_extension.load("an_op", [sys.argv[2]], is_python_module=False)
"""


@pytest.mark.slow
def test_torch_compiles_behind_a_lock_that_was_left_behind(lock: Path, start: Start) -> None:
    """By the program of an environment that is not activated: pip's ninja is not on PATH."""
    start(COMPILES).kill()
    source = lock.parent.parent / "op.cpp"
    source.write_text('extern "C" int answer() { return 42; }\n')
    without = lock.parent.parent / "bin"
    without.mkdir()
    for program in (p for folder in os.environ["PATH"].split(os.pathsep) for p in Path(folder).glob("*")):
        if program.name not in ("ninja", "ninja-build") and not (without / program.name).is_symlink():
            (without / program.name).symlink_to(program)
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(lock.parent.parent), "PATH": str(without)}
    command = [sys.executable, "-c", COMPILE, str(lock), str(source)]
    for compiles in (True, False):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert (f"DeepSpeed: an_op is compiled, once, in {lock.parent}" in done.stdout) == compiles
        assert ("took over" in done.stdout) == compiles
        assert not lock.exists()


def test_a_folder_for_each_version_unless_the_user_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp_extension, "FileBaton", cpp_extension.FileBaton)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/mine")
    prepare_extensions("0.19.8")
    assert os.environ["TORCH_EXTENSIONS_DIR"] == "/mine"
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    prepare_extensions("0.19.8")
    folder = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    assert folder.parent == Path(cpp_extension.get_default_build_root())
    assert folder.name == f"py{sys.version.split()[0]}_torch{torch.__version__}_deepspeed0.19.8"
    monkeypatch.setenv("PATH", "/usr/nowhere")
    prepare_extensions("0.19.8")
    if (Path(sysconfig.get_path("scripts")) / "ninja").exists():
        assert shutil.which("ninja")
    assert os.environ["PATH"].startswith("/usr/nowhere")  # what the user has comes first

"""DeepSpeed's parts in C++, which torch compiles when they are first used: where, in sight, and never waiting for ever.

torch keeps a file `lock` in the folder of what it compiles. A process that is killed meanwhile leaves it there, and
every later one waits for it without a word. Here whoever compiles holds the file by `flock`, which ends with the
process, and has written its name into it: so a lock whose process is gone is known, and taken over.
"""

from __future__ import annotations

import fcntl
import os
import platform
import shutil
import socket
import sysconfig
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import torch
from torch.utils.file_baton import FileBaton

from ssam_scale.errors import UserError

# Since the last change of anything in the folder. One file may take ten minutes where many processes share few cores.
GIVE_UP_SECONDS = 1800.0
# The same, where no process that this machine shows has the lock open and its name is not in it: it is not ours.
STALE_SECONDS = 120.0
_POLL_SECONDS = 0.2
_SHARED_FILE_SYSTEMS = ("nfs", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb", "fuse", "9p", "afs", "pvfs", "wekafs")


def prepare_extensions(deepspeed: str) -> None:
    """Before DeepSpeed is imported: a folder for these versions, `ninja` on PATH, and locks that end.

    Args:
        deepspeed: its version.
    """
    from torch.utils import cpp_extension

    if "TORCH_EXTENSIONS_DIR" not in os.environ:
        # torch's own folder knows Python's and CUDA's version only, and is compiled anew by each in turn.
        versions = f"py{platform.python_version()}_torch{torch.__version__}_deepspeed{deepspeed}"
        os.environ["TORCH_EXTENSIONS_DIR"] = str(Path(cpp_extension.get_default_build_root()) / versions)
    scripts = sysconfig.get_path("scripts")
    if shutil.which("ninja") is None and shutil.which("ninja", path=scripts) is not None:
        # DeepSpeed depends on pip's, which is there whether or not the environment is activated.
        os.environ["PATH"] = os.pathsep.join([*filter(None, [os.environ.get("PATH")]), scripts])
    cpp_extension.FileBaton = Baton  # type: ignore[misc]  # what `cpp_extension.load` takes the lock by


class Baton(FileBaton):
    """The lock of a folder in which an extension is compiled, in the place of torch's `FileBaton`.

    Args:
        lock_file_path: the file that is the lock, in the folder of the extension.
        wait_seconds: as torch's; not needed.
        warn_after_seconds: as torch's; not needed.
    """

    def __init__(self, lock_file_path: str, wait_seconds: float = 0.1, warn_after_seconds: float | None = None) -> None:
        super().__init__(lock_file_path)
        self._path = Path(lock_file_path)
        self._fd: int | None = None

    def try_acquire(self) -> bool:
        """Whether it is this process that has to compile. If it is another, waits until that one has.

        Raises:
            UserError: that takes too long; names the lock, and what to do.
        """
        told, acquired = False, self._created() or self._taken_over()
        changed, since = self._last_change(), time.monotonic()
        while not acquired:
            if not self._path.exists():
                return False
            if not told and not self._library.exists():
                told = _say(f"DeepSpeed: another process compiles {self._name}; waiting for it ({self._path})")
            if (now := self._last_change()) != changed:
                changed, since = now, time.monotonic()
            if time.monotonic() - since > GIVE_UP_SECONDS:
                raise UserError(
                    f"{self._path}: {self._holder() or 'another process'} has held this lock for "
                    f"{GIVE_UP_SECONDS / 60:.0f} minutes and compiled nothing; if no process of that kind runs any "
                    "more, remove the file and start again"
                )
            time.sleep(_POLL_SECONDS)
            acquired = self._taken_over()
        if not self._library.exists():
            _say(f"DeepSpeed: {self._name} is compiled, once, in {self._path.parent}: a minute or several")
        return True

    def wait(self) -> None:
        """Nothing is left to wait for."""

    def release(self) -> None:
        """Others may go on."""
        # In this order: what is there without a `flock` would be taken for what a dead process has left.
        with suppress(FileNotFoundError):
            self._path.unlink()
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    @property
    def _name(self) -> str:
        return self._path.parent.name

    @property
    def _library(self) -> Path:
        return self._path.parent / f"{self._name}.so"

    def _created(self) -> bool:
        """Whether the lock was free, and is ours."""
        try:
            self._hold(os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644))
        except FileExistsError:
            return False
        return True

    def _taken_over(self) -> bool:
        """Whether the lock was that of a process that is gone, and is ours."""
        try:
            fd = os.open(self._path, os.O_RDWR)
        except OSError:  # gone, or somebody else's
            return False
        with ExitStack() as stack, suppress(OSError):
            stack.callback(os.close, fd)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Not one that has been removed and made again since it was opened.
            same = self._path.exists() and os.path.samestat(os.fstat(fd), self._path.stat())
            if same and self._is_stale():
                stack.pop_all()
                self._hold(fd)
                _say(f"DeepSpeed: took over {self._path}, which a process has left behind that is gone")
        return self._fd is not None

    def _hold(self, fd: int) -> None:
        self._fd = fd
        with suppress(OSError):  # some file systems cannot; then nobody takes it over
            fcntl.flock(fd, fcntl.LOCK_EX)  # first: a name without it is that of a process which is gone
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)

    def _holder(self) -> str:
        """What is written in it; nothing where it was made by torch alone."""
        try:
            return self._path.read_text(errors="replace").strip()
        except OSError:
            return ""

    def _is_stale(self) -> bool:
        """Whether its process is gone, given that none holds it by a `flock` that is seen from here."""
        if holder := self._holder():
            # Of another machine a shared file system may show no locks.
            return holder.endswith(f" on {socket.gethostname()}")
        quiet = time.time() - self._last_change()
        return quiet > STALE_SECONDS and not _is_shared(self._path.parent) and not _is_open(self._path)

    def _last_change(self) -> float:
        """When anything in the folder was written last, in seconds since the epoch."""
        times = [0.0]
        for path in self._path.parent.iterdir():
            with suppress(OSError):
                times.append(path.stat().st_mtime)
        return max(times)


def _is_open(path: Path) -> bool:
    """Whether another process of this machine may have a file open."""
    import psutil  # DeepSpeed depends on it

    if path.stat().st_uid != os.geteuid():
        return True  # that user's processes are not ours to look into
    real = str(path.resolve())
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.pid != os.getpid() and any(file.path == real for file in process.open_files()):
                return True
    return False


def _is_shared(folder: Path) -> bool:
    """Whether other machines may see a folder, too."""
    import psutil

    real = folder.resolve()
    mounts = [m for m in psutil.disk_partitions(all=True) if real.is_relative_to(m.mountpoint)]
    kind: str = max(mounts, key=lambda m: len(m.mountpoint)).fstype if mounts else ""
    return kind.startswith(_SHARED_FILE_SYSTEMS)


def _say(text: str) -> bool:
    """A line, of one process of each machine."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        from ssam_scale.console import console  # a loop of one's own may have nothing that prints

        console().print(text, soft_wrap=True)
    return True

"""Whether this machine has what training needs, and enough of it."""

from __future__ import annotations

import importlib
import os
import platform
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from ssam_scale.cores import usable_cores
from ssam_scale.finding import Finding, checked
from ssam_scale.folders import existing, why_not_writable
from ssam_scale.sharding.device import DeviceChoice, choose_device

from .written import extensions_folder, temporary_folder

_SETUP = "bash launch/setup.sh installs it (docs/install.md)"
_FILES = 4096  # open at once: of some loaders, sockets of hundreds of processes, and a store
_SHARED_MEMORY = 2**30  # by which NCCL and loaders hand on what GPUs of one machine exchange
_TEMPORARY = 2**30
_MEMORY = 4 * 2**30


def installation(device: DeviceChoice = "auto") -> list[Finding]:
    """What is found on this machine; nothing is left behind.

    Args:
        device: that processes are to compute on.
    """
    return [
        *_packages(),
        checked("device", lambda: _device(device)),
        *_drivers(),
        *_deepspeed(),
        cores(usable_cores(), os.cpu_count() or 1, os.environ.get("OMP_NUM_THREADS")),
        memory(_limit_of_cgroup(Path("/sys/fs/cgroup")), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
        shared_memory(Path("/dev/shm")),
        open_files(*resource.getrlimit(resource.RLIMIT_NOFILE)),
        _temporary(),
        clock(time.time(), Path(__file__).stat().st_mtime),
    ]


def cores(usable: int, there: int, threads: str | None) -> Finding:
    """Cores that a process may run on.

    Args:
        usable: their number.
        there: of the machine.
        threads: what OMP_NUM_THREADS says.
    """
    said = f"{usable} of {there} usable" + (f", OMP_NUM_THREADS={threads}" if threads else "")
    if usable == 1 < there:
        return Finding(
            "warn", "cores", said, "give the job more (Slurm: --cpus-per-task; taskset), or loading waits for computing"
        )
    return Finding("ok", "cores", said)


def memory(limit: int | None, there: int) -> Finding:
    """The memory that processes may take together.

    Args:
        limit: of their control group, bytes; None: it has none.
        there: of the machine, bytes.
    """
    if limit is None or limit >= there:
        return Finding("ok", "memory", f"{_gib(there)}, no limit below it")
    said = f"limited to {_gib(limit)} of {_gib(there)} by the control group"
    return (
        Finding("ok", "memory", said)
        if limit >= _MEMORY
        else Finding("warn", "memory", said, "give the job or the container more (Slurm: --mem; docker: --memory)")
    )


def shared_memory(folder: Path) -> Finding:
    """What processes of one machine exchange through memory.

    Args:
        folder: where it is mounted.
    """
    if not folder.is_dir():
        return Finding("warn", "shared memory", f"there is no {folder}", "mount a tmpfs there")
    if (problem := why_not_writable(folder)) is not None:
        return Finding("warn", "shared memory", f"{folder}: {problem}", "mount a tmpfs there, with mode=1777")
    size = shutil.disk_usage(folder).total
    if size < _SHARED_MEMORY:
        return Finding(
            "warn", "shared memory", f"{folder} holds {_gib(size)}", "give it 1 GiB or more (docker: --shm-size=8g)"
        )
    return Finding("ok", "shared memory", f"{folder} holds {_gib(size)}")


def open_files(soft: int, hard: int) -> Finding:
    """How many files a process may have open.

    Args:
        soft: the limit.
        hard: up to which it may be raised.
    """
    if soft == resource.RLIM_INFINITY or soft >= _FILES:
        return Finding("ok", "open files", "no limit" if soft == resource.RLIM_INFINITY else f"{soft:,}")
    enough = hard == resource.RLIM_INFINITY or hard >= _FILES
    how = (
        f"ulimit -n {_FILES}" if enough else f"raise the hard limit, which is {hard:,} (limits.conf; docker: --ulimit)"
    )
    return Finding("warn", "open files", f"{soft:,}, of which hundreds of processes need more", how)


def clock(now: float, installed: float) -> Finding:
    """Whether the clock is behind what it cannot be behind.

    Args:
        now: seconds since 1970, by the clock.
        installed: when this package's files were written.
    """
    said = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))
    if now < installed - 86400.0:
        return Finding(
            "warn", "clock", f"{said}, before this package was installed", "set it (chrony, systemd-timesyncd)"
        )
    return Finding("ok", "clock", said)


def _packages() -> Iterator[Finding]:
    yield Finding("ok", "Python", f"{platform.python_version()} ({sys.executable})")
    yield Finding("ok", "torch", torch.__version__)
    for name, module in (
        ("timm", "ssam_scale.models.timm_model"),
        ("FFCV", "ssam_scale.data.ffcv_import"),
        ("MLflow", "mlflow"),
    ):
        try:
            importlib.import_module(module)
        except Exception as error:  # whatever a library that is half installed raises
            reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
            yield Finding("fail", name, f"cannot be imported ({reason})", "" if "setup.sh" in reason else _SETUP)
        else:
            yield Finding("ok", name, _version(name))
    yield from _compiled()


def _compiled() -> Iterator[Finding]:
    from ssam_scale.data import crop, resize

    for what, library, good, bad, packages in (
        (
            "JPEG crops",
            crop,
            "are decoded alone",
            "JPEGs are decoded as a whole, in 1.2 times the time",
            "gcc libjpeg-dev",
        ),
        ("resizing", resize, "is compiled", "images take some milliseconds more each", "gcc"),
    ):
        if library.library() is not None:
            yield Finding("ok", what, good)
        else:
            file = library.__name__.rpartition(".")[2]
            why = f"{bad}: {file}.c cannot be compiled"
            yield Finding("warn", what, why, f"apt-get install {packages}, or set CC")


def _version(name: str) -> str:
    from ssam_scale.tracking.environment import versions

    return versions().get(name.lower(), "there")


def _device(asked: DeviceChoice) -> str:
    device = choose_device(asked)
    if device.type == "cpu":
        return "CPU"
    count, name = torch.cuda.device_count(), torch.cuda.get_device_name(device)
    free, total = torch.cuda.mem_get_info(device)
    return f"{count} × {name}, {_gib(total)} each, {_gib(free)} free on the first, CUDA {torch.version.cuda}"


def _drivers() -> Iterator[Finding]:
    """Of NVIDIA, where torch computes with them."""
    if not torch.cuda.is_available():
        return
    version = Path("/proc/driver/nvidia/version")
    if version.is_file():
        yield Finding("ok", "driver", version.read_text().splitlines()[0].removeprefix("NVRM version: ").strip())
    if torch.distributed.is_nccl_available():
        yield Finding("ok", "NCCL", ".".join(map(str, torch.cuda.nccl.version())))
    else:
        yield Finding("fail", "NCCL", "torch was built without it", "install torch's own wheels, which have it")


def _deepspeed() -> Iterator[Finding]:
    """Which only the backends zero0 to zero3 need, so that nothing of it is a failure."""
    from ssam_scale.sharding.zero.version import import_deepspeed

    found = checked("DeepSpeed", lambda: str(import_deepspeed(choose_device("auto")).__version__))
    yield found if found.verdict == "ok" else Finding("warn", "DeepSpeed", found.said)
    lacking = [
        name for name, command in (("g++", os.environ.get("CXX", "g++")), ("ninja", "ninja")) if not _has(command)
    ]
    if lacking:
        yield Finding(
            "warn",
            "compiler",
            f"{' and '.join(lacking)} not found, by which DeepSpeed and train.compile make code when they first run",
            "apt-get install g++ ninja-build",
        )
    else:
        yield Finding("ok", "compiler", "g++ and ninja are there")
    yield extensions_folder().probed()


def _has(command: str) -> bool:
    return bool(command.split()) and shutil.which(command.split()[0]) is not None


def _temporary() -> Finding:
    written = temporary_folder()
    found = written.probed()
    if found.verdict != "ok":
        return found
    free = shutil.disk_usage(existing(written.folder)).free
    said = f"{written.folder} has {_gib(free)} free"
    if free < _TEMPORARY:
        return Finding("warn", found.what, said, "make room, or set TMPDIR to a folder with 1 GiB")
    return Finding("ok", found.what, said)


def _limit_of_cgroup(root: Path) -> int | None:
    """Bytes that the processes of this one's control group may take together; None: no limit, or none that is shown.

    Args:
        root: where control groups are mounted.
    """
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    found = []
    for line in lines:
        _, controllers, group = line.split(":", 2)
        base, name = (root, "memory.max") if not controllers else (root / "memory", "memory.limit_in_bytes")
        if controllers and "memory" not in controllers.split(","):
            continue
        place = base / group.lstrip("/")
        # Limits of all groups above hold as well; within a container its own group is the root.
        for folder in (place, *(p for p in place.parents if p == base or base in p.parents)):
            try:
                found.append(int((folder / name).read_text()))
            except (OSError, ValueError):  # not there, or "max"
                continue
    return min(found, default=None)


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"

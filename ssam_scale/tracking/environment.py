"""Tags of a run that say what it ran from and on: git commit, versions, hardware, Slurm job."""

from __future__ import annotations

import getpass
import os
import platform
import shlex
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from ssam_scale.cores import usable_cores
from ssam_scale.tracking.redaction import without_secrets

if TYPE_CHECKING:
    from ssam_scale.sharding.device import DeviceChoice

_PACKAGES = ("ssam_scale", "torch", "torchvision", "timm", "ffcv", "numba", "deepspeed", "mlflow")
_REPOSITORY = Path(__file__).resolve().parent


def environment_tags(device: DeviceChoice = "auto") -> dict[str, str]:
    """All tags of this process; what cannot be found out is left out. Takes some 20 ms, and no network.

    Args:
        device: that it was told to compute on.
    """
    world = world_size()
    return {
        **git_tags(),
        **{f"version/{name}": version for name, version in (versions() | _cuda()).items()},
        **hardware_tags(device),
        **_slurm_tags(),
        "world_size": str(world),
        "process": process(),
        "command": without_secrets(shlex.join(sys.argv)),
        # MLflow's own names, which its interface shows in columns of their own.
        "mlflow.source.name": Path(sys.argv[0]).name or "python",
        "mlflow.source.type": "LOCAL",
        **_user_tag(),
    }


def process() -> str:
    """`host:pid` of this process."""
    return f"{socket.gethostname()}:{os.getpid()}"


def world_size() -> int:
    """Number of processes of the job."""
    # Asked of what is loaded: a process that never imported torch is alone, and importing it takes seconds.
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_available() and dist.is_initialized():
        return int(dist.get_world_size())
    return int(os.environ.get("WORLD_SIZE", "1"))


def git_tags() -> dict[str, str]:
    """Commit of this package's source and whether the working tree differs from it; empty outside a repository."""
    # An installed copy may lie inside somebody's repository (a virtual environment) without being a part of it.
    if _git("ls-files", "--error-unmatch", __file__) is None:
        return {}
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return {}
    status = _git("status", "--porcelain", "--untracked-files=no")
    dirty = {} if status is None else {"git_dirty": str(bool(status)).lower()}
    return {"git_commit": commit, "mlflow.source.git.commit": commit, **dirty}


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(_REPOSITORY), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that decide results, without importing them."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _cuda() -> dict[str, str]:
    """The CUDA that torch was built for, which no package's version says; empty where it was built for none."""
    version = sys.modules["torch"].version.cuda if "torch" in sys.modules else None
    return {} if version is None else {"cuda": version}


def hardware_tags(device: DeviceChoice = "auto") -> dict[str, str]:
    """`cpu`, `cores` (those this process may use), `memory_gib`, `gpus`, and `hardware`, which sums them up.

    Times are compared only between runs with the same `hardware`. GPUs count only where they are computed on.
    """
    memory = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    cores, cpu, gpus = usable_cores(), _cpu_model(), _gpus(device)
    hardware = f"{gpus}; {cpu}, {cores} cores" if gpus else f"{cpu}, {cores} cores"
    return {"cpu": cpu, "cores": str(cores), "memory_gib": str(memory), "gpus": gpus or "none", "hardware": hardware}


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _gpus(device: DeviceChoice) -> str:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return ""
    from ssam_scale.sharding.device import cpu_is_asked_for

    if cpu_is_asked_for(device):
        return ""
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names))


def _slurm_tags() -> dict[str, str]:
    if "SLURM_JOB_ID" not in os.environ:
        return {}
    names = {"slurm_job_id": "SLURM_JOB_ID", "slurm_nodes": "SLURM_JOB_NODELIST"}
    return {tag: os.environ[name] for tag, name in names.items() if name in os.environ}


def _user_tag() -> dict[str, str]:
    try:
        return {"mlflow.user": getpass.getuser()}
    except (KeyError, OSError, ImportError):  # a container may run under a number without a name
        return {}

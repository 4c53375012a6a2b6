"""A real Slurm of two nodes on this machine: its own munged, controller and two slurmd, on loopback, in a folder.

Nothing of a Slurm that may be installed here is touched: configuration, sockets, ports and keys are its own.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from .processes import daemon, free_ports, run, wait_until

CORES = ((os.cpu_count() or 2), max(1, (os.cpu_count() or 2) - 1))
"""Of the nodes n1 and n2."""

GRACE_S = 120
"""Between the SIGTERM of a job that is preempted (by one in the partition `urgent`) and its end."""

_CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
MailProg=/bin/true
KillWait=5
SlurmdTimeout=300
SlurmdParameters=config_overrides
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={first_port} CPUs={cores[0]}
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={second_port} CPUs={cores[1]}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=n1,n2 Default=YES State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace}
PartitionName=urgent Nodes=n1,n2 State=UP PriorityTier=2 PreemptMode=OFF
"""


def missing() -> str | None:
    """Why there can be no Slurm here."""
    absent = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if not shutil.which(name, path=_path())]
    return f"not installed: {', '.join(absent)} (slurm-wlm, munge)" if absent else None


class Cluster:
    """What a user of the cluster does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": _path()}

    def command(self, *words: str | Path, cwd: Path = Path("/"), env: Mapping[str, str] | None = None) -> str:
        """The output of a Slurm command that must succeed."""
        # munged gives a client two seconds to speak, and the controller some to answer, which a loaded machine may not.
        for attempt in range(6):
            done = run(words, cwd=cwd, env=self.env | dict(env or {}), timeout=60)
            refused = done.stdout.strip() and not re.search("munge|timed out|contact slurm", done.stdout, re.I)
            if done.returncode == 0 or refused:
                break
            time.sleep(attempt)
        assert done.returncode == 0, f"{words}: {done.stdout}\n{self.logs()}"
        return done.stdout

    def submit(self, *words: str | Path, cwd: Path, env: Mapping[str, str] | None = None) -> str:
        """The id of a job: `sbatch` with options, script and its arguments, from a folder."""
        output = self.command("sbatch", *words, cwd=cwd, env=env)
        match = re.search(r"Submitted batch job (\d+)", output)
        assert match, output
        return match[1]

    def job(self, job: str) -> dict[str, str]:
        """What the controller knows of a job, e.g. JobState, ExitCode, Restarts."""
        return dict(re.findall(r"(\w+)=(\S*)", self.command("scontrol", "show", "job", job)))

    def wait(self, job: str, timeout: float) -> dict[str, str]:
        """The job after it has ended, in whatever way.

        One that is being queued again shows how it failed for a moment: it has ended when that is still so later.
        """
        going_on = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "SIGNALING")

        def ended() -> bool:
            if self.job(job)["JobState"] in going_on:
                return False
            time.sleep(3.0)
            return self.job(job)["JobState"] not in going_on

        wait_until(ended, timeout, f"job {job} ends\n{self.logs()}")
        return self.job(job)

    def logs(self) -> str:
        """The ends of the daemons' logs, for when a test fails."""
        return "\n".join(f"--- {path.name}\n{path.read_text()[-600:]}" for path in sorted(self.folder.glob("*.log")))


@contextlib.contextmanager
def two_nodes() -> Iterator[Cluster]:
    """A cluster of the nodes n1 and n2, ended with everything that runs on it."""
    # Not pytest's temporary folder: the path of a socket has at most 107 characters, and munged must get into it.
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    try:
        with contextlib.ExitStack() as stack:
            cluster = Cluster(folder)
            _munge(folder, stack)
            _configure(folder)
            env = cluster.env
            stack.enter_context(daemon(["slurmctld", "-D"], folder / "slurmctld.log", env))
            for node in ("n1", "n2"):
                stack.enter_context(daemon(["slurmd", "-D", "-N", node], folder / f"slurmd-{node}.log", env))
            stack.callback(cancel_all, cluster)
            wait_until(lambda: _idle(cluster) == 2, 60, f"two idle nodes\n{cluster.logs()}")
            yield cluster
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _munge(folder: Path, stack: contextlib.ExitStack) -> None:
    home = folder / "munge"
    home.mkdir(mode=0o755)
    folder.chmod(0o755)
    key = home / "key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    as_user: list[str] = []
    if os.geteuid() == 0:
        shutil.chown(home, "munge", "munge")
        shutil.chown(key, "munge", "munge")
        as_user = ["setpriv", "--reuid=munge", "--regid=munge", "--clear-groups"]
    files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    options = [f"--{option}={home / name}" for option, name in files.items()]
    command = [*as_user, "munged", "--foreground", "--force", *options]
    process = stack.enter_context(daemon(command, folder / "munged.log", {"PATH": _path()}))
    wait_until(
        lambda: (home / "socket").exists() or process.poll() is not None, 20, f"munged in {folder} opens its socket"
    )
    assert process.poll() is None, (folder / "munged.log").read_text()


def _configure(folder: Path) -> None:
    controller, first, second = free_ports(3)
    (folder / "state").mkdir()
    for node in ("n1", "n2"):
        (folder / f"spool-{node}").mkdir()
    config = _CONFIG.format(
        host=socket.gethostname().partition(".")[0],
        user=getpass.getuser(),
        folder=folder,
        controller_port=controller,
        first_port=first,
        second_port=second,
        cores=CORES,
        grace=GRACE_S,
    )
    (folder / "slurm.conf").write_text(config)
    version = subprocess.run(["slurmd", "-V"], capture_output=True, text=True, env={"PATH": _path()}, check=True).stdout
    if (
        int(version.split()[1].split(".")[0]) >= 23
    ):  # which would want a cgroup of its own even where nothing asks for it
        (folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")


def _idle(cluster: Cluster) -> int:
    done = run(["sinfo", "-h", "-N", "-p", "main", "-o", "%T"], cwd=Path("/"), env=cluster.env, timeout=60)
    return done.stdout.split().count("idle") if done.returncode == 0 else 0


def cancel_all(cluster: Cluster) -> None:
    """End all jobs of a cluster: what a test that has failed leaves running keeps the nodes from the next one."""
    run(["scancel", "--user", getpass.getuser()], cwd=Path("/"), env=cluster.env, timeout=60)
    with contextlib.suppress(AssertionError):
        wait_until(lambda: not cluster.command("squeue", "-h").strip(), 30, "all jobs end")


def _path() -> str:
    return os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])

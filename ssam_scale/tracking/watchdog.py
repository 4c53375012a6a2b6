"""Marks a run KILLED when its process ended without a word, with the signal that ended it.

A process of its own that waits for its parent to end: `python watchdog.py RUN_ID PROCESS PARENT_PID FOLDER`, with the
tracking URI on standard input, because it may hold a password and everybody on the machine can read arguments. The
tracking process ends it when it has marked the run itself. Run as a file, not as a module, so that waiting costs
neither torch nor MLflow. A heartbeat instead would have every run write to the store all the time, and would need a
reader that judges it: MLflow's own pages do not, and would go on showing the run as running.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

_POLL_S = 1.0
_PATIENCE_S = 3600.0


def start(uri: str, run_id: str, process: str, unsent: Path) -> subprocess.Popen[bytes]:
    """Start watching this process on behalf of a run; `stop` ends the watcher.

    Args:
        uri: of the run's store.
        run_id: of the run.
        process: what its tag `process` says.
        unsent: the folder in which it leaves what the store has not got.
    """
    watcher = subprocess.Popen(
        [sys.executable, __file__, run_id, process, str(os.getpid()), str(unsent.absolute())],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # Ctrl-C in the terminal goes to the whole group, and a launcher may end one; this has to outlive both.
        start_new_session=True,
    )
    assert watcher.stdin is not None
    with watcher.stdin as told:
        told.write(uri.encode())
    return watcher


def stop(watcher: subprocess.Popen[bytes]) -> None:
    """End a watcher: the run has been marked."""
    watcher.kill()
    watcher.wait()


def _main(uri: str, run_id: str, process: str, parent: int, unsent: Path) -> None:
    # This file's folder comes first on the path of a script; its module names must not shadow anybody's.
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]
    sys.path.append(str(Path(__file__).resolve().parents[2]))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # An orphan is given another parent at once. Asking for the parent, unlike waiting for a pipe to close, is not
    # fooled by loader processes that inherited the other end.
    ended = _waited_for(parent)
    while os.getppid() == parent:
        time.sleep(_POLL_S)
    os.environ.update(MLFLOW_DISABLE_TELEMETRY="true", DO_NOT_TRACK="true")
    from mlflow import MlflowClient

    vanished, pause = int(time.time() * 1000), _POLL_S
    while True:
        try:
            client = MlflowClient(uri)
            run = client.get_run(run_id)
            # The run may have been resumed by another process in the meantime; then it is no longer ours to mark.
            if run.info.status == "RUNNING" and run.data.tags.get("process") == process:
                failure = f"the process {ended}"
                if _waits(unsent):
                    failure += f"; what had not arrived by then: ssam-scale send {unsent}"
                client.set_tag(run_id, "failure", failure)
                client.set_terminated(run_id, "KILLED", vanished)
            return
        except Exception:  # MLflow lets its drivers' errors through, of every kind
            if time.time() > vanished / 1000 + _PATIENCE_S:
                return
            # A server that was killed with the process, by the same lack of memory, comes back.
            time.sleep(pause)
            pause = min(2 * pause, 60.0)


def _waited_for(parent: int) -> str:
    """Wait until a parent ends; how it has, in words."""
    from ssam_scale.ended import status_of_dead, status_words

    try:
        pidfd = os.pidfd_open(parent)
        poller = select.poll()
        poller.register(pidfd, select.POLLIN)
        while os.getppid() == parent and not poller.poll(1000.0 * _POLL_S):
            pass
        status = status_of_dead(parent)  # before its own parent has asked, which is a matter of chance
    except (OSError, AttributeError):  # gone already; no Linux
        status = None
    return (
        "vanished (SIGKILL, as where the memory was exhausted, or another signal)"
        if status is None
        else status_words(status)
    )


def _waits(unsent: Path) -> bool:
    """Whether there is more than the first line of the records, see `spool`."""
    try:
        return (unsent / "records.jsonl").read_bytes().count(b"\n") > 1
    except OSError:
        return False


if __name__ == "__main__":
    _main(sys.stdin.read(), sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))

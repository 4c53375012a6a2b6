"""Does for a run what its process, which has ended, cannot: sends what waits, and marks one killed without a word.

A process of its own, with the tracking URI on standard input, because it may hold a password and everybody on the
machine can read arguments:

    python watchdog.py watch FOLDER RUN_ID PROCESS PARENT_PID   waits for its parent to end, sends, marks the run KILLED
    python watchdog.py send FOLDER                              sends what a run that has ended has left in `FOLDER`

The tracking process ends the first when it closes the run itself, and starts the second if the store has not got all.
Run as a file, not as a module, so that waiting costs neither torch nor MLflow. A heartbeat instead would have every run
write to the store all the time, and would need a reader that judges it: MLflow's own pages do not, and would go on
showing the run as running.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

_POLL_S, _LONGEST_PAUSE_S = 1.0, 60.0
_PATIENCE_S = 6 * 3600.0


def start(uri: str, run_id: str, process: str, unsent: Path) -> subprocess.Popen[bytes]:
    """Start watching this process on behalf of a run; `stop` ends the watcher.

    Args:
        uri: of the run's store.
        run_id: of the run.
        process: what its tag `process` says.
        unsent: the folder in which it leaves what the store has not got.
    """
    return _started(uri, "watch", str(unsent.absolute()), run_id, process, str(os.getpid()))


def stop(watcher: subprocess.Popen[bytes]) -> None:
    """End a watcher: the run has been closed."""
    watcher.kill()
    watcher.wait()


def send_later(uri: str, unsent: Path) -> None:
    """Start sending what a run that has ended has left, for as long as there is something, and not for ever.

    Args:
        uri: of the run's store.
        unsent: the folder in which it is.
    """
    sender = _started(uri, "send", str(unsent.absolute()))
    sender.returncode = 0  # it outlives this process, which is not to ask for it


def _started(uri: str, *arguments: str) -> subprocess.Popen[bytes]:
    watcher = subprocess.Popen(
        [sys.executable, __file__, *arguments],
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


def _main(uri: str, what: str, unsent: Path, *watched: str) -> None:
    # This file's folder comes first on the path of a script; its module names must not shadow anybody's.
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]
    sys.path.append(str(Path(__file__).resolve().parents[2]))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    attempt: Callable[[], bool] = partial(_sent, uri, unsent)
    if what == "watch":
        run_id, process, parent = watched
        ended = _waited_for(int(parent))
        while os.getppid() == int(parent):
            time.sleep(_POLL_S)
        attempt = partial(_marked, uri, unsent, run_id, process, ended, int(time.time() * 1000))
    os.environ.update(MLFLOW_DISABLE_TELEMETRY="true", DO_NOT_TRACK="true")
    give_up, pause = time.monotonic() + _PATIENCE_S, _POLL_S
    # A server that was killed with the process, by the same lack of memory, comes back.
    while not attempt() and time.monotonic() < give_up:
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_S)


def _sent(uri: str, unsent: Path) -> bool:
    """Whether there is nothing left to do about what waits."""
    from ssam_scale.errors import UserError
    from ssam_scale.tracking.spool import AwayError, send

    try:
        send(unsent, uri)
    except AwayError:
        return False
    except UserError:  # nothing waits any more; the store refuses it
        return True
    return True


def _marked(uri: str, unsent: Path, run_id: str, process: str, ended: str, when: int) -> bool:
    """Whether there is nothing left to do about a run whose process has ended."""
    from ssam_scale.tracking.store import open_store

    try:
        client = open_store(uri, create=False)

        def is_ours() -> bool:
            # The run may have been resumed by another process in the meantime.
            return bool(client.get_run(run_id).data.tags.get("process") == process)

        if not is_ours():
            return True
        done = not unsent.exists() or _sent(uri, unsent)
        if is_ours() and client.get_run(run_id).info.status == "RUNNING":
            failure = f"the process {ended}"
            if unsent.exists():
                failure += f"; what had not arrived by then: ssam-scale send {unsent}"
            client.set_tag(run_id, "failure", failure)
            client.set_terminated(run_id, "KILLED", when)
    except Exception:  # MLflow lets its drivers' errors through, of every kind
        return False
    return done


def _waited_for(parent: int) -> str:
    """Wait until a parent ends; how it has, in words."""
    from ssam_scale.ended import status_of_dead, status_words

    # An orphan is given another parent at once. Asking for the parent, unlike waiting for a pipe to close, is not
    # fooled by loader processes that inherited the other end.
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


if __name__ == "__main__":
    _main(sys.stdin.read(), sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])

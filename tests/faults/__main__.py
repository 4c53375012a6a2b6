"""`python -m tests.faults`: random faults in real trainings, and a table of what became of them.

    python -m tests.faults --events 60 --seed 0
    python -m tests.faults --events 20 --backend fsdp2 --only SIG

Everything happens on a small file system in memory, which only these processes see and which fills up in earnest: that
takes `unshare` (util-linux), and root or user namespaces. The exit code is 1 if anything is not as it should be.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SIZE = "256m"
_INSIDE = "SSAM_SCALE_FAULTS_INSIDE"


def main() -> None:
    """Let faults happen, print the table, record it where that is asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--events", type=int, default=60, help="how many faults, over all backends [60]")
    parser.add_argument("--seed", type=int, default=0, help="of what happens when [0]")
    parser.add_argument("--backend", action="append", help="may be given several times [all]")
    parser.add_argument("--epochs", type=int, default=30, help="of each training, of 6 steps each [30]")
    parser.add_argument("--only", default="", help="only faults whose names this regular expression finds")
    parser.add_argument("--record", type=Path, metavar="FOLDER", help="also write the table and its raw rows there")
    arguments = parser.parse_args()
    if _INSIDE not in os.environ:
        _enter()
    from tests.support import gpus, ranks

    gpus.hide_gpus()
    ranks.preload_for_whole_runs()
    from ssam_scale.bench.record import provenance, result_path, write

    from .chaos import BACKENDS, ONE_PROCESS, happen
    from .kinds import LIVE

    backends = arguments.backend or list(BACKENDS)
    if unknown := [each for each in backends if each not in BACKENDS]:
        parser.error(f"--backend {unknown[0]}: one of {', '.join(BACKENDS)}")
    alone = ONE_PROCESS in backends
    if not any(re.search(arguments.only, each.name) and not (alone and each.shared) for each in LIVE):
        parser.error(f"--only {arguments.only}: nothing of that ends a training{' of one process' * alone}")
    made = provenance(["python", "-m", "tests.faults", *sys.argv[1:]])
    home = Path(os.environ[_INSIDE])
    result = happen(backends, arguments.events, arguments.seed, arguments.epochs, home, arguments.only)
    lines = [
        f"{len(result.events)} faults in {len(result.chains)} trainings of {arguments.epochs} epochs of 6 steps, a "
        "checkpoint every second step; each goes on with `--resume auto`; on two processes but where it says one.",
        "",
        *result.table(),
    ]
    print("\n".join(lines))
    if arguments.record is not None:
        text = ["# Faults, and what became of them", "", *lines]
        write(result_path(arguments.record, "faults"), text, result.rows(), made)
    sys.exit(1 if result.failures else 0)


def _enter() -> None:
    """Run this command again in a mount namespace of its own, with a small file system for all that is written."""
    unshare = shutil.which("unshare")
    if unshare is None:
        sys.exit("python -m tests.faults: error: unshare is not installed; it is in the package util-linux")
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        again = shlex.join([sys.executable, "-m", "tests.faults", *sys.argv[1:]])
        mount = f"mount -t tmpfs -o size={SIZE} faults {shlex.quote(folder)} && exec {again}"
        root = [] if os.geteuid() == 0 else ["--map-root-user"]
        environment = {**os.environ, _INSIDE: folder, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([unshare, "--mount", *root, "sh", "-c", mount], env=environment, check=False)
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()

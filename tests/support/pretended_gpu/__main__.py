"""`python -m tests.support.pretended_gpu [--devices N] ARGUMENT...` is `python ARGUMENT...` with pretended GPUs.

The arguments are `-m MODULE`, `-c CODE` or a file, and what these are given.
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from pathlib import Path


def main() -> None:
    """Pretend, then be `python ARGUMENT...`."""
    parser = argparse.ArgumentParser(prog="python -m tests.support.pretended_gpu", description=__doc__)
    parser.add_argument("--devices", type=int, default=1)
    arguments = sys.argv[1:]
    before = 2 if arguments[:1] == ["--devices"] else 0
    devices = parser.parse_args(arguments[:before]).devices
    if not (what := arguments[before:]):
        parser.error("nothing to run")
    os.environ["DS_ACCELERATOR"] = "cuda" if devices else "cpu"
    os.environ["SSAM_SCALE_PRETENDED_GPUS"] = str(devices)

    from .library import load

    library = load(devices)  # before torch

    from . import cuda, nccl

    cuda.install(library, devices)
    nccl.install()
    if what[0] == "-m":
        sys.argv = what[1:]
        runpy.run_module(what[1], run_name="__main__", alter_sys=True)
    elif what[0] == "-c":
        sys.argv = ["-c", *what[2:]]
        exec(compile(what[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = what
        sys.path.insert(0, str(Path(what[0]).resolve().parent))
        runpy.run_path(what[0], run_name="__main__")


if __name__ == "__main__":
    main()

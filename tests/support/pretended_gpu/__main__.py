"""`python -m tests.support.pretended_gpu [--devices N] -m MODULE [ARGUMENT]...`: run a module with pretended GPUs."""

from __future__ import annotations

import argparse
import os
import runpy
import sys


def pretend(devices: int) -> None:
    """From here on, this process has so many GPUs. Before torch is imported.

    Args:
        devices: how many.
    """
    os.environ["DS_ACCELERATOR"] = "cuda" if devices else "cpu"
    os.environ["SSAM_SCALE_PRETENDED_GPUS"] = str(devices)

    from .library import load

    library = load(devices)  # before torch

    from . import cuda, nccl

    cuda.install(library, devices)
    nccl.install()


def main() -> None:
    """Pretend, then be `python -m MODULE ARGUMENT...`."""
    parser = argparse.ArgumentParser(prog="python -m tests.support.pretended_gpu", description=__doc__)
    parser.add_argument("--devices", type=int, default=1)
    before, (_, module, *arguments) = sys.argv[1 : sys.argv.index("-m")], sys.argv[sys.argv.index("-m") :]
    asked = parser.parse_args(before)
    pretend(asked.devices)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()

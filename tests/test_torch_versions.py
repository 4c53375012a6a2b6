"""The oldest torch and the newest known one: what depends on torch's own ways is run again, in another environment.

    pytest -m exhaustive tests/test_torch_versions.py

Each takes gigabytes from pip's sources, and ten minutes. What is not torch comes from the environment of this run.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import pytest
import torch

from ssam_scale.torch_compat import OLDEST
from tests.support.checkout import ROOT
from tests.support.processes import run

VERSIONS = [OLDEST, (2, 14)]
GIGABYTES = 12
"""That an environment takes, with CUDA's libraries and while it is made."""

QUICK = ["tests/perturbation", "tests/masks", "tests/models", "tests/sharding", "tests/test_torch_compat.py"]
SLOW = ["tests/sharding/test_fsdp.py", "tests/sharding/test_dcp.py", "tests/models/test_ema.py"]


@pytest.mark.exhaustive
@pytest.mark.timeout(5400)
@pytest.mark.parametrize("version", VERSIONS, ids=lambda version: ".".join(map(str, version)))
def test_on_another_torch(version: tuple[int, int]) -> None:
    major, minor = version
    if torch.__version__.startswith(f"{major}.{minor}."):
        pytest.skip("this run has it")
    with tempfile.TemporaryDirectory() as folder:
        if shutil.disk_usage(folder).free < GIGABYTES << 30:
            pytest.skip(f"{folder} has no {GIGABYTES} GB")
        python = _environment(Path(folder), f"torch=={major}.{minor}.*", f"torchvision==0.{minor + 15}.*")
        found = subprocess.run([python, "-c", "import torch; print(torch.__version__)"], capture_output=True, text=True)
        assert found.stdout.startswith(f"{major}.{minor}."), found.stderr
        for chosen in (["-m", "not slow", *QUICK], ["-m", "slow", *SLOW]):
            done = run(
                [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen],
                cwd=ROOT,
                env={"PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"},
                timeout=2400,
            )
            print(f"torch {found.stdout.strip()}: {done.stdout.splitlines()[-1]}")
            assert done.returncode == 0, done.stdout


def _environment(folder: Path, *requirements: str) -> Path:
    """The Python of a new environment with these requirements, and this one's packages for all else."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    inside = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
    Path(inside, "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    done = subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--no-cache-dir", *requirements], capture_output=True, text=True
    )
    if done.returncode:
        reason = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [f"exit {done.returncode}"]
        pytest.skip(f"pip has no {' and '.join(requirements)} here: {reason[-1]}")
    return python

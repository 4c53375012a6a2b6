"""Output that nobody reads on is no mistake."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("command", [["list", "masks"], ["list", "masks", "--json"], ["--version"], ["--help"]])
@pytest.mark.parametrize("buffered", ["", "1"])
def test_a_closed_pipe(command: list[str], buffered: str) -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "ssam_scale", *command],
            stdout=write,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": buffered},
        )
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")

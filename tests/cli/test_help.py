"""Help answers at once, because asking for it imports nothing that only the commands need."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

# Not pydantic, which typer imports itself where it is installed.
HEAVY = {"cv2", "deepspeed", "ffcv", "matplotlib", "mlflow", "numba", "numpy", "timm", "torch", "yaml"}
OURS = {"ssam_scale", "ssam_scale.cli", "ssam_scale.console", "ssam_scale.errors"}

ASK = """
import json, sys
from ssam_scale.cli.main import main
try:
    main([*sys.argv[1:], "--help"])
except SystemExit as end:
    assert not end.code, end.code
print(json.dumps(list(sys.modules)), file=sys.stderr)
"""


@pytest.mark.parametrize(
    "command", ["", "train", "data", "data write", "cost", "compare", "list", "bench", "bench steps"]
)
def test_help_imports_neither_torch_nor_anything_of_ours_but_the_commands(command: str) -> None:
    asked = [sys.executable, "-c", ASK, *command.split()]
    done = subprocess.run(asked, capture_output=True, text=True, check=True)
    assert "Usage: " in done.stdout
    modules = set(json.loads(done.stderr))
    assert not modules & HEAVY
    ours = {name for name in modules if name.partition(".")[0] == "ssam_scale"}
    assert {name for name in ours if not name.startswith("ssam_scale.cli.")} == OURS


def test_help_lists_every_command() -> None:
    done = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, check=True)
    listed = {line.split()[1] for line in done.stdout.splitlines() if line.startswith("│ ")}
    assert {"train", "data", "cost", "compare", "list", "bench"} <= listed

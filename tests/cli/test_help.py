"""Help answers at once, because asking for it imports nothing that only the commands need."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys

import pytest

import ssam_scale

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
    "command",
    [
        "",
        "train",
        "evaluate",
        "predict",
        "export",
        "average",
        "data",
        "data write",
        "cost",
        "compare",
        "sharpness",
        "send",
        "doctor",
        "list",
        "stages",
        "bench",
        "bench steps",
    ],
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
    assert {"evaluate", "predict", "export", "average", "consolidate"} <= listed
    assert {"train", "data", "cost", "compare", "sharpness", "send", "doctor", "list", "stages", "bench"} <= listed


def test_the_version_and_those_of_what_decides_how_it_computes() -> None:
    ask = ASK.replace('[*sys.argv[1:], "--help"]', '["--version"]')
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert lines["ssam_scale"] == ssam_scale.__version__
    assert lines["torch"] == importlib.metadata.version("torch")
    assert {"torchvision", "timm", "deepspeed", "ffcv", "mlflow", "Python"} <= {name.rstrip(":") for name in lines}
    assert not set(json.loads(done.stderr)) & HEAVY

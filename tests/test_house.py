"""The floors of the house: who may import whom (docs/tour.md); and tests that stand alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ssam_scale

ROOT = Path(ssam_scale.__file__).parent
FLOORS = [
    "cli",
    "trained",
    "train",
    "bench",
    "costs",
    "tracking",
    "data",
    "models",
    "methods",
    "sharpness",
    "perturbation",
    "masks",
    "sharding",
    "config",
]
APART = {"masks": "sharding"}  # masks see a group of processes, and not how weights are distributed over them
OWNERS = {"mlflow": "tracking", "matplotlib": "tracking", "ffcv": "data", "deepspeed": "sharding"}
MODULES = sorted(ROOT.rglob("*.py"))
TESTS = Path(__file__).parent
TEST_MODULES = sorted(path for path in TESTS.rglob("*.py") if path.name.startswith(("test_", "conftest")))


def floor_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports_of(path: Path, root: Path = ROOT) -> set[str]:
    """Absolute names of all modules, and of what is imported from them, anywhere in a file below the package `root`."""
    package = [root.name, *path.relative_to(root).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_downwards_and_stay_in_their_house(path: Path) -> None:
    floor = floor_of(path)
    for name in imports_of(path):
        top, *rest = name.split(".")
        assert OWNERS.get(top, floor) == floor, f"{path} imports {top}, which only {OWNERS[top]}/ may"
        if top == "ssam_scale" and rest and rest[0] in FLOORS and floor in FLOORS:
            assert FLOORS.index(rest[0]) >= FLOORS.index(floor), f"{path} imports upwards: {name}"
            assert rest[0] != APART.get(floor), f"{path} imports {name}: {floor}/ knows nothing of {rest[0]}/"


@pytest.mark.parametrize("path", TEST_MODULES, ids=lambda p: str(p.relative_to(TESTS)))
def test_no_test_module_imports_another(path: Path) -> None:
    for name in imports_of(path, TESTS):
        top, *rest = name.split(".")
        assert top != "tests" or not rest or rest[0] == "support", f"{path} imports {name}; shared parts go to support"


@pytest.mark.slow
def test_training_imports_neither_measurement_nor_predictions() -> None:
    code = "import sys, ssam_scale.train; print(*sorted(m for m in sys.modules if m.startswith('ssam_scale.')))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    loaded = done.stdout.split()
    assert "ssam_scale.train.loop" in loaded
    assert [name for name in loaded if name.split(".")[1] in ("bench", "costs")] == []

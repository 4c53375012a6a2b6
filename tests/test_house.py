"""The floors of the house: who may import whom (README, how it is built)."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import ssam_scale

ROOT = Path(ssam_scale.__file__).parent
FLOORS = [
    "cli",
    "train",
    "bench",
    "costs",
    "tracking",
    "data",
    "models",
    "methods",
    "perturbation",
    "masks",
    "sharding",
    "config",
]
OWNERS = {"mlflow": "tracking", "matplotlib": "tracking", "ffcv": "data", "deepspeed": "sharding"}
MODULES = sorted(ROOT.rglob("*.py"))


def floor_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    """Absolute names of all modules imported anywhere in a file."""
    package = ["ssam_scale", *path.relative_to(ROOT).parts[:-1]]
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

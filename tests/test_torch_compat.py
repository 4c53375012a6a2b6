"""One module knows of versions of PyTorch; what is too old is told in one line, wherever it is met."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ssam_scale
from ssam_scale.errors import UnsupportedVersionError, UserError
from ssam_scale.torch_compat import OLDEST, check_torch, foreach_clone
from tests.support.checkout import ROOT

HOUSE = Path(ssam_scale.__file__).parent
LATE_NAMES = {
    "all_gather_single",
    "reduce_scatter_single",
    "reset_iter_state",
    "_fsdp_param_group",
    "_fsdp_param_groups",
    "forward_sync_buffers",
    "broadcast_buffers",
    "_foreach_clone",
}
"""Of which torch 2.10 does not have some, and 2.13 others."""
SOURCES = [path for path in sorted(HOUSE.rglob("*.py")) if path.name != "torch_compat.py"]


@pytest.mark.parametrize(
    "version",
    ["2.10.0", "2.10.1+cu128", "2.10.0a0+b4e4ee8.nv25.12", "2.13.0+cpu", "2.99.0", "3.0.0", torch.__version__],
)
def test_versions_that_are_taken(version: str) -> None:
    check_torch(version)


@pytest.mark.parametrize("version", ["1.13.1", "2.4.0+cu121", "2.9.1", "2.9.0a0+50eac811a6.nv25.9"])
def test_versions_that_are_refused(version: str) -> None:
    with pytest.raises(UnsupportedVersionError) as error:
        check_torch(version)
    assert str(error.value) == (
        f"torch {version} is too old: ssam_scale needs 2.10 or newer; pip install 'torch>=2.10' torchvision"
    )
    assert isinstance(error.value, UserError)
    assert isinstance(error.value, ImportError)


def test_the_package_asks_for_the_same() -> None:
    assert f'"torch>={OLDEST[0]}.{OLDEST[1]}",' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("late", [True, False])
def test_copies_are_the_same_in_memory(late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not late:
        monkeypatch.delattr(torch, "_foreach_clone", raising=False)
    tensors = [torch.randn(3), torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), torch.tensor(-0.0)]
    for t, copied in zip(tensors, foreach_clone(tensors), strict=True):
        assert torch.equal(t.view(torch.int32), copied.view(torch.int32))
        assert t.stride() == copied.stride()
        assert t.data_ptr() != copied.data_ptr()


@pytest.fixture
def old_torch(tmp_path: Path) -> dict[str, str]:
    """An environment in which torch is of another time: it has nothing of what is used here but a version."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text('__version__ = "2.9.1+cu128"\n')
    # The modules of torch that are imported before anything of ours could be, and what is asked of it there.
    (tmp_path / "torch" / "distributed").mkdir()
    (tmp_path / "torch" / "distributed" / "__init__.py").write_text("")
    return {"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": ""}


def python(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("name", ["SparseSAM", "Depth", "StagedModel"])
def test_a_loop_of_ones_own_is_told_at_the_import(old_torch: dict[str, str], name: str) -> None:
    done = python(old_torch, "-c", f"from ssam_scale import {name}")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "ssam_scale.errors.UnsupportedVersionError: torch 2.9.1+cu128 is too old: ssam_scale needs 2.10 or newer; "
        "pip install 'torch>=2.10' torchvision"
    )


COMMANDS = [
    "train --config configs/quickstart.yaml",
    "train --config configs/quickstart.yaml --dry-run",
    "cost --config configs/quickstart.yaml",
    "bench steps",
    "bench memory",
    "bench bytes",
    "bench masks",
    "bench storage",
    "list masks",
    "list backends",
    "list models",
    "list schedules",
    "list scores",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_that_computes_ends_with_one_line(old_torch: dict[str, str], command: str) -> None:
    done = python(old_torch, "-m", "ssam_scale", *command.split())
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("ssam-scale: error: torch 2.9.1+cu128 is too old: ssam_scale needs 2.10 or newer; ")
    assert done.stderr.count("\n") == 1


def test_the_script_for_launchers_too(old_torch: dict[str, str]) -> None:
    done = python(old_torch, "launch/train.py", "--config", "configs/quickstart.yaml")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


def test_commands_that_need_no_torch_do_not_ask_for_it(old_torch: dict[str, str]) -> None:
    done = python(old_torch, "-m", "ssam_scale", "train", "--config", "configs/quickstart.yaml", "--print-config")
    assert done.returncode == 0, done.stderr
    assert "device: auto" in done.stdout


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(HOUSE)))
def test_nothing_else_asks_for_versions_or_uses_names_that_came_late(path: Path) -> None:
    tree = ast.parse(path.read_text())
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    used |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg}
    assert not used & LATE_NAMES
    comparing = [
        ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare) and "torch.__version__" in ast.unparse(node)
    ]
    assert comparing == []

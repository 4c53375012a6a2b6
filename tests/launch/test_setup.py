"""launch/setup.sh where it cannot do everything itself."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.checkout import ROOT

TOOLS = (
    "bash env sed cut cat dirname basename mkdir mktemp rm touch tail sort sha256sum realpath readlink tr sleep grep id"
)


@pytest.fixture
def bare() -> Iterator[Path]:
    """A checkout beside a folder `bin` with what every Debian has and nothing more, readable for every user."""
    folder = Path(tempfile.mkdtemp(prefix="bare ", dir="/tmp"))
    try:
        folder.chmod(0o777)
        (folder / "bin").mkdir()
        for tool in TOOLS.split():
            (folder / "bin" / tool).symlink_to(shutil.which(tool) or pytest.fail(f"no {tool}"))
        (folder / "launch").mkdir(mode=0o777)
        shutil.copy(ROOT / "launch" / "setup.sh", folder / "launch")
        shutil.copy(ROOT / "pyproject.toml", folder)
        yield folder
    finally:
        shutil.rmtree(folder)


def apt_get(folder: Path, script: str = "exit 0") -> None:
    """A stand-in for apt-get that writes down how it was called."""
    file = folder / "bin" / "apt-get"
    file.write_text(f'#!/bin/bash\nprintf "%s\\n" "$*" >>"{folder}/called"\n{script}\n')
    file.chmod(0o755)


def set_up(folder: Path, *arguments: str, as_root: bool) -> subprocess.CompletedProcess[str]:
    drop = []
    if not as_root and os.geteuid() == 0:
        drop = [
            shutil.which("setpriv") or pytest.skip("no setpriv"),
            "--reuid=65534",
            "--regid=65534",
            "--clear-groups",
        ]
    return subprocess.run(
        [*drop, "/bin/bash", folder / "launch" / "setup.sh", *arguments],
        cwd="/",
        env={"PATH": str(folder / "bin")},
        capture_output=True,
        text=True,
        timeout=60,
    )


on_debian = pytest.mark.skipif(not Path("/etc/debian_version").exists(), reason="names packages of Debian and Ubuntu")
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root installs system packages")


@on_debian
@pytest.mark.parametrize("arguments", [(), ("dev",)])
def test_without_root_it_says_what_to_install(bare, arguments):
    apt_get(bare)
    done = set_up(bare, *arguments, as_root=False)
    assert done.returncode == 2
    assert done.stdout == ""
    command = done.stderr.splitlines()[-1].strip()
    before, _, packages = command.partition(" --no-install-recommends ")
    assert before == "sudo apt-get update && sudo apt-get install -y"
    wanted = {"g++", "ninja-build", "pkg-config"}
    assert wanted <= set(packages.split())
    assert ("chromium" in packages) == bool(arguments)
    assert not (bare / ".venv").exists()
    assert not (bare / "called").exists()


@on_debian
@as_root
def test_with_root_it_installs_once_and_checks(bare):
    apt_get(bare)
    done = set_up(bare, as_root=True)
    update, install = (bare / "called").read_text().splitlines()
    assert update.endswith(" update")
    assert " install --no-install-recommends " in install
    assert "g++" in install.split()
    # The stand-in installs nothing, which must not go unnoticed.
    assert done.returncode == 2
    assert "still missing after the installation: " in done.stderr or "no Python 3.10" in done.stderr


@on_debian
@as_root
def test_a_failing_apt_is_shown(bare):
    apt_get(bare, "[[ $* != *install* ]] || { echo 'E: Unable to locate package' && exit 100; }")
    done = set_up(bare, as_root=True)
    assert done.returncode == 1
    assert "E: Unable to locate package" in done.stderr


def test_a_python_that_is_no_python(bare):
    done = subprocess.run(
        ["bash", bare / "launch" / "setup.sh"],
        env={**os.environ, "PYTHON": "/bin/false"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr == "setup: PYTHON=/bin/false is not a Python 3.10 or newer that runs\n"


def test_an_unknown_argument(bare):
    done = subprocess.run(["bash", bare / "launch" / "setup.sh", "devel"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "setup: unknown argument devel; the only one is: dev\n"


@pytest.mark.parametrize("script", sorted([*ROOT.glob("launch/*.sh"), *ROOT.glob("slurm/*.sh"), ROOT / ".ci" / "run"]))
def test_scripts_are_whole(script):
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck"):
        done = subprocess.run(["shellcheck", script], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout

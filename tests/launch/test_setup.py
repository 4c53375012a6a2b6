"""launch/setup.sh where it cannot do everything itself."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.checkout import ROOT

pytestmark = pytest.mark.slow

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


def set_up(folder: Path, *arguments: str, as_root: bool, **environment: str) -> subprocess.CompletedProcess[str]:
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
        env={"PATH": str(folder / "bin"), **environment},
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
    wanted = {"g++", "pkg-config"}
    assert wanted <= set(packages.split())
    # The demonstration's data are what only the quickstart and the tests need.
    assert ("chromium" in packages) == bool(arguments)
    assert ("dataset-fashion-mnist" in packages) <= bool(arguments)
    assert not (bare / ".venv").exists()
    assert not (bare / "called").exists()


@on_debian
@pytest.mark.parametrize("named_by", ["CPATH", "CONDA_PREFIX", "PKG_CONFIG_PATH", None])
def test_headers_count_wherever_the_compiler_or_pkg_config_finds_them(bare: Path, named_by: str | None) -> None:
    """As conda, Spack and module files bring them; nothing of the system's is seen here."""
    there = bare / "environment" / "include"
    there.mkdir(parents=True)
    there.parent.chmod(0o755)
    (there / "turbojpeg.h").touch()
    (there / "libturbojpeg.pc").write_text("Name: TurboJPEG\nDescription: of a module file\nVersion: 3\n")
    for tool, before in (("g++", "-nostdinc -nostdinc++"), ("pkg-config", "")):
        if not (real := shutil.which(tool)):
            pytest.skip(f"no {tool}")
        (bare / "bin" / tool).write_text(f'#!/bin/bash\nPKG_CONFIG_LIBDIR=/nowhere exec {real} {before} "$@"\n')
        (bare / "bin" / tool).chmod(0o755)
    folders = {"CONDA_PREFIX": there.parent}
    done = set_up(bare, as_root=False, **({named_by: str(folders.get(named_by, there))} if named_by else {}))
    missing = set(done.stderr.splitlines()[1].split())
    assert ("libturbojpeg0-dev" in missing) == (named_by is None)
    assert not missing & {"g++", "pkg-config"}


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


# A Python that writes down what pip is to install, "installs" torch by leaving its version beside itself, and is a real
# one otherwise.
PYTHON = r"""#!/bin/bash
here=$(dirname "$0")
case $* in
*"import torch;"*) exec cat "$here/torch" ;;
*'m.version("torchvision")'*) exec cat "$here/torchvision" ;;
*"-m venv"*)
    target=${*: -1}
    mkdir -p "$target/bin"
    cp "$0" "$target/bin/python"
    [[ $* != *--system-site-packages* ]] || cp "$here/torch" "$here/torchvision" "$target/bin" 2>/dev/null || true
    ;;
*"-m pip install"*)
    [[ $* != *+cpu* || -e $here/../../cpu-builds ]] || exit 1
    all=$*
    printf '%s\n' "${all##*raw }" >>"$here/../../called"
    for word; do
        version=${word##*==} build=gpu
        [[ $version != *+cpu ]] || build=cpu
        case $word in
        torch==*)
            [[ $(cat "$here/torch") == "$version"* ]] ||
                printf '%s' "$version $build $here/torch/__init__.py" >"$here/torch"
            ;;
        torchvision==*) printf '%s' "${version/.\*/.9}" >"$here/torchvision" ;;
        esac
    done
    ;;
*"-m pip"* | *"import ffcv"*) ;;
*) exec @PYTHON@ "$@" ;;
esac
"""


class Checkout:
    """Where set-up is run with a stand-in for Python, which may have a torch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = folder / "outer" / "python"
        self.python.parent.mkdir()
        self.python.write_text(PYTHON.replace("@PYTHON@", os.path.realpath(sys.executable)))
        self.python.chmod(0o755)
        (folder / "launch").mkdir()
        shutil.copy(ROOT / "launch" / "setup.sh", folder / "launch")
        shutil.copy(ROOT / "pyproject.toml", folder)

    def has(self, where: str, torch: str, build: str, vision: str | None = None) -> None:
        """A torch, of this version and for this, where a Python lies."""
        (self.folder / where / "torch").write_text(f"{torch} {build} {self.folder / where}/torch/__init__.py")
        if vision is not None:
            (self.folder / where / "torchvision").write_text(vision)

    def has_venv(self) -> None:
        (self.folder / ".venv" / "bin").mkdir(parents=True)
        shutil.copy(self.python, self.folder / ".venv" / "bin" / "python")

    def set_up(self) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            ["bash", self.folder / "launch" / "setup.sh"],
            env={**os.environ, "PYTHON": str(self.python)},
            capture_output=True,
            text=True,
        )
        if "system packages are missing" in done.stderr or "install by hand" in done.stderr:
            pytest.skip("system packages are missing, which come first")
        return done

    @property
    def installed(self) -> list[str]:
        """What pip was given that has to do with torch, one call a line."""
        calls = (self.folder / "called").read_text().splitlines()
        return [call for call in calls if "torch==" in call or "torchvision==" in call]

    @property
    def constraints(self) -> list[str]:
        return (self.folder / ".venv" / "constraints.txt").read_text().splitlines()


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


without_gpu = pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="for machines without a GPU")


@without_gpu
@pytest.mark.parametrize(("cpu_builds", "version"), [(True, "2.13.0+cpu"), (False, "2.13.0")])
def test_where_there_is_no_torch_the_usual_one_is_installed(checkout: Checkout, cpu_builds: bool, version: str) -> None:
    if cpu_builds:
        (checkout.folder / "cpu-builds").touch()
    done = checkout.set_up()
    assert done.returncode == 0, done.stderr
    cpu = ["torch==2.13.0+cpu torchvision==0.28.0+cpu"] if cpu_builds else []
    assert checkout.installed == [*cpu, "torch==2.13.0 torchvision==0.28.0"]
    # Nothing that is installed later can replace them.
    assert checkout.constraints[0] == f"torch=={version}"
    assert checkout.constraints[1].startswith("torchvision==0.28.0")
    wanted = (checkout.folder / ".venv" / "requirements.txt").read_text()
    assert "torch" not in wanted
    assert "timm>=" in wanted


@without_gpu
def test_an_image_with_cuda_gets_a_torch_for_gpus_though_none_is_seen(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    (checkout.folder / "cpu-builds").touch()
    monkeypatch.setenv("CUDA_VERSION", "13.0.2")
    assert checkout.set_up().returncode == 0
    assert checkout.installed == ["torch==2.13.0 torchvision==0.28.0"]


@pytest.mark.parametrize(
    ("torch", "vision"),
    [("2.10.0+cu128", "0.25"), ("2.11.0", "0.26"), ("2.14.1", "0.29"), ("2.10.0a0+b4e4ee8.nv25.12", "0.25")],
)
def test_a_torch_for_gpus_is_kept_with_the_torchvision_that_goes_with_it(
    checkout: Checkout, torch: str, vision: str
) -> None:
    checkout.has("outer", torch, "gpu")
    done = checkout.set_up()
    assert done.returncode == 0, done.stderr
    assert f"Keeping torch {torch} from " in done.stdout
    assert checkout.installed == [f"--no-deps torchvision=={vision}.*"]
    assert checkout.constraints == [f"torch=={torch}", f"torchvision=={vision}.9"]


def test_a_torchvision_that_goes_with_it_stays(checkout: Checkout) -> None:
    checkout.has("outer", "2.11.0+cu128", "gpu", vision="0.26.0+cu128")
    assert checkout.set_up().returncode == 0
    assert checkout.installed == []
    assert checkout.constraints == ["torch==2.11.0+cu128", "torchvision==0.26.0+cu128"]


@pytest.mark.parametrize(
    ("torch", "vision"), [("2.13.0+cpu", "0.28.0"), ("2.14.1+cpu", "0.29.1"), ("2.10.0", "0.25.0")]
)
def test_whatever_is_in_the_environment_and_in_range_stays(checkout: Checkout, torch: str, vision: str) -> None:
    checkout.has_venv()
    checkout.has(".venv/bin", torch, "cpu", vision=vision)
    assert checkout.set_up().returncode == 0
    assert checkout.installed == []
    assert checkout.constraints == [f"torch=={torch}", f"torchvision=={vision}"]


def test_a_torchvision_of_another_release_is_replaced_alone(checkout: Checkout) -> None:
    checkout.has_venv()
    checkout.has(".venv/bin", "2.14.1+cpu", "cpu", vision="0.28.0")
    assert checkout.set_up().returncode == 0
    assert checkout.installed == ["--no-deps torchvision==0.29.*"]


@pytest.mark.parametrize("torch", ["2.9.1+cu128", "1.13.1", "2.9.0a0+50eac811a6.nv25.9"])
def test_a_torch_for_gpus_that_is_too_old_is_told_and_left_alone(checkout: Checkout, torch: str) -> None:
    checkout.has("outer", torch, "gpu", vision="0.24.1")
    done = checkout.set_up()
    assert done.returncode == 2
    assert done.stderr == (
        f"setup: torch {torch} in {checkout.folder}/outer is too old, 2.10 or newer is needed; upgrade it, or name a "
        "Python without it: PYTHON=/path/to/python3\n"
    )
    assert not (checkout.folder / "called").exists()


def test_one_that_is_too_old_in_the_environment_is_replaced(checkout: Checkout) -> None:
    checkout.has_venv()
    checkout.has(".venv/bin", "2.9.1", "gpu", vision="0.24.1")
    done = checkout.set_up()
    assert done.returncode == 0, done.stderr
    assert checkout.installed[-1] == "torch==2.13.0 torchvision==0.28.0"
    assert checkout.constraints[0] == "torch==2.13.0"

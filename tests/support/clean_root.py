"""A root folder with a minimal Debian and nothing else, in which the steps of a Dockerfile are taken."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.support.processes import run

MIRROR, SUITE = "http://deb.debian.org/debian", "bookworm"

# In a mount and a process namespace of their own, so that neither mounts nor processes are left behind.
_ENTER = """
root=$1 user=$2 folder=$3 binds=$4
mount -t proc proc "$root/proc"
mkdir -p "$root/dev/shm"
mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"
for path in $binds; do mount --bind -o ro "$path" "$root/host$path"; done
shift 4
exec chroot --userspec="$user:$user" "$root" /bin/sh -c 'cd "$1" && shift && exec "$@"' sh "$folder" "$@"
"""


@dataclass(frozen=True)
class Step:
    """An instruction of a Dockerfile, and what it is given."""

    name: str
    value: str


def steps(text: str) -> list[Step]:
    """The instructions of a Dockerfile, each on a line of its own."""
    joined = re.sub(r"\\\n\s*", "", "\n".join(line for line in text.splitlines() if not line.startswith("#")))
    return [Step(*line.split(None, 1)) for line in joined.splitlines() if line.strip()]


@dataclass
class CleanRoot:
    """A minimal Debian, and what the steps so far have said of whatever runs in it.

    Attributes:
        folder: the root.
        environment: of what runs.
        user: its number.
        home: its working folder.
        shell: what a RUN is given to.
        entrypoint: what runs at the end, before the words that it is given.
        command: those words, where there are no others.
    """

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)
    user: str = "0"
    home: str = "/"
    shell: list[str] = field(default_factory=lambda: ["/bin/sh", "-c"])
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)

    def build(self, text: str, context: Mapping[str, Path], arguments: Mapping[str, str]) -> None:
        """Take the steps of a Dockerfile, but for its base.

        Args:
            text: of the Dockerfile.
            context: the files that it may copy, by their paths in the context.
            arguments: `--build-arg`.
        """
        built: dict[str, str] = {}
        for step in steps(text):
            name, value = step.name, step.value
            if name == "ARG":
                key, _, default = value.partition("=")
                built[key] = arguments.get(key, default.strip('"'))
            elif name == "RUN":
                done = self.run(*self.shell, value, environment=built)
                assert done.returncode == 0, f"RUN {value}:\n{done.stdout}"
            elif name == "COPY":
                *sources, target = value.split()
                self._copy(sources, target, context)
            elif name == "WORKDIR":
                self.home = value
                (self.folder / value.lstrip("/")).mkdir(parents=True, exist_ok=True)
            elif name == "ENV":
                for word in shlex.split(value):
                    key, _, said = word.partition("=")
                    self.environment[key] = said.replace("$PATH", self._path())
            elif name == "USER":
                self.user = value
            elif name in ("SHELL", "ENTRYPOINT", "CMD"):
                setattr(self, {"CMD": "command"}.get(name, name.lower()), json.loads(value))
            else:
                assert name == "FROM", f"{name}: say here what it does"

    def run(
        self, *words: str, environment: Mapping[str, str] | None = None, timeout: float = 3600
    ) -> subprocess.CompletedProcess[str]:
        """Run something as the steps so far say."""
        said = {"PATH": self._path()} | _pip_environment() | self.environment | dict(environment or {})
        binds = " ".join(map(str, self._bound()))
        enter = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-ec", _ENTER, "sh"]
        enter += [str(self.folder), self.user, self.home, binds]
        kept = [f"{key}={value}" for key, value in said.items()]
        return run([*enter, "env", "-i", *kept, *words], cwd=Path("/"), timeout=timeout)

    def start(self, *words: str) -> subprocess.CompletedProcess[str]:
        """What a container does: the entry point with these words, or with its own."""
        return self.run(*self.entrypoint, *(words or self.command))

    def _path(self) -> str:
        return self.environment.get("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")

    def _copy(self, sources: Sequence[str], target: str, context: Mapping[str, Path]) -> None:
        place = self.folder / os.path.normpath(f"{self.home}/{target}").lstrip("/")
        for source in sources:
            prefix = "" if source == "." else f"{source.rstrip('/')}/"
            found = {name: path for name, path in context.items() if name.startswith(prefix)}
            if source in context:
                found = {Path(source).name: context[source]}
                prefix = ""
            assert found, f"COPY {source}: not in the context"
            for name, path in found.items():
                file = place / name.removeprefix(prefix)
                file.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, file)

    def _bound(self) -> Iterable[Path]:
        """What of this machine is seen in it, below `/host`."""
        for path in _pip_paths():
            there = self.folder / "host" / str(path).lstrip("/")
            if path.is_dir():
                there.mkdir(parents=True, exist_ok=True)
            else:
                there.parent.mkdir(parents=True, exist_ok=True)
                there.touch()
            yield path


def clean_root(folder: Path) -> CleanRoot:
    """Make one, or skip the test that wants it where this machine cannot."""
    if os.geteuid() != 0:
        pytest.skip("only root may make another root")
    tools = {name: shutil.which(name) for name in ("debootstrap", "unshare", "chroot")}
    if missing := [name for name, path in tools.items() if path is None]:
        pytest.skip(f"no {missing[0]}: bash launch/setup.sh dev")
    if run(["unshare", "--mount", "--pid", "--fork", "true"], cwd=folder).returncode:
        pytest.skip("this machine has no namespaces for mounts and processes")
    done = run(["debootstrap", "--variant=minbase", SUITE, folder, MIRROR], cwd=folder, timeout=1800)
    assert done.returncode == 0, done.stdout[-3000:]
    folder.chmod(0o755)  # pytest's folders let nobody else in, and the image has a user
    return CleanRoot(folder)


def _pip_settings() -> dict[str, str]:
    """pip's configuration on this machine, by key."""
    done = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    lines = (line.partition("=") for line in done.stdout.splitlines())
    return {key.rpartition(".")[2]: value.strip("'\"") for key, _, value in lines}


def _pip_environment() -> dict[str, str]:
    """The same as variables, for a process that sees this machine's files below `/host`.

    Where pip downloads from is this machine's own business.
    """
    named = {f"PIP_{key.upper().replace('-', '_')}": value for key, value in _pip_settings().items()}
    return {key: re.sub(r"(^|\s|file://)(?=/)", r"\1/host", value) for key, value in named.items()}


def _pip_paths() -> list[Path]:
    """Files and folders of this machine that pip's configuration names; of an index, also what its pages name."""
    words = [word.removeprefix("file://") for value in _pip_settings().values() for word in value.split()]
    paths = [Path(word) for word in words if word.startswith("/") and Path(word).exists()]
    return sorted({path.parent if path.name == "simple" else path for path in paths})

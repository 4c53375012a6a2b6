"""Scripts of the shell and files that make images, as linters and readers of such files see them."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.support.checkout import ROOT
from tests.support.clean_root import steps
from tests.support.processes import daemon, free_port, run, wait_until

SCRIPTS = sorted([*ROOT.glob("launch/*.sh"), *ROOT.glob("slurm/*.sh"), ROOT / ".ci" / "run"])
DOCKERFILE = ROOT / "docker" / "Dockerfile"
COMPOSE = ROOT / "docker" / "compose.yaml"
APPTAINER = ROOT / "docker" / "ssam_scale.def"


def tool(name: str) -> str:
    """A linter of the development set-up."""
    path = os.pathsep.join([str(ROOT / ".venv" / "bin"), os.environ["PATH"]])
    return shutil.which(name, path=path) or pytest.fail(f"no {name}: bash launch/setup.sh dev")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_are_whole(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    done = run([tool("shellcheck"), script], cwd=ROOT)
    assert done.returncode == 0, done.stdout


def test_the_dockerfile_is_what_its_linter_wants() -> None:
    done = run([tool("hadolint"), DOCKERFILE], cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "")


def test_a_change_of_the_code_does_not_repeat_the_installation() -> None:
    found = steps(DOCKERFILE.read_text())
    set_up = next(i for i, step in enumerate(found) if step.name == "RUN" and "launch/setup.sh" in step.value)
    before = {word for step in found[:set_up] if step.name == "COPY" for word in step.value.split()[:-1]}
    assert before == {"pyproject.toml", "README.md", "LICENSE", "launch/setup.sh", "ssam_scale/__init__.py"}
    assert [step.value for step in found[set_up:] if step.name in ("COPY", "RUN")][1:] == [". ."]


def test_nobody_is_root_in_the_image() -> None:
    users = [step.value for step in steps(DOCKERFILE.read_text()) if step.name == "USER"]
    assert users[-1].isdecimal()
    assert users[-1] != "0"


def test_the_definition_for_apptainer_is_the_same_image() -> None:
    """The same base, files and set-up; Apptainer itself is not among what the tests install."""
    found, text = steps(DOCKERFILE.read_text()), APPTAINER.read_text()
    sections = dict(re.findall(r"^%(\w+)\n((?:    .*\n|\n)*)", text, re.MULTILINE))
    assert f"BASE={found[0].value.removeprefix('BASE=')}" in sections["arguments"].split()
    kept = {
        line[1:] for line in (DOCKERFILE.parent / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"
    }
    assert {line.split()[0] for line in sections["files"].splitlines() if line} == kept
    assert all((ROOT / name).exists() for name in kept)
    assert "PIP_NO_CACHE_DIR=1 bash /opt/ssam_scale/launch/setup.sh" in sections["post"]
    (environment,) = [step.value for step in found if step.name == "ENV"]
    said = {word for word in environment.split() if not word.startswith("HOME=")}
    assert {line.split(None, 1)[1] for line in sections["environment"].splitlines() if line} == said
    subprocess.run(["sh", "-n"], input=sections["post"] + sections["runscript"], text=True, check=True)


def test_ports_of_the_composition_answer_this_machine_only() -> None:
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert ports == ["127.0.0.1:5000:5000"]
    assert not any("network_mode" in service or service.get("user") == "root" for service in services.values())


@pytest.mark.exhaustive
def test_the_server_of_the_composition_answers_the_trainer(tmp_path: Path) -> None:
    """By the name that the trainer knows it by, and nobody who comes by another, as a web page would."""
    server = yaml.safe_load(COMPOSE.read_text())["services"]["mlflow"]
    port = free_port()
    words = " ".join([*server["entrypoint"], *server["command"]])
    words = words.replace("/mlflow/", f"{tmp_path}/").replace("--host=0.0.0.0", "--host=127.0.0.1")
    command = words.replace("--port=5000", f"--port={port}").split()
    with daemon([Path(sys.executable).parent / command[0], *command[1:]], tmp_path / "log", server["environment"]):

        def status(host: str) -> str:
            words = shlex.split(f"curl -s -o /dev/null -w %{{http_code}} -H 'Host: {host}' http://127.0.0.1:{port}/")
            return run(words, cwd=tmp_path).stdout

        wait_until(lambda: status("localhost:5000") == "200", 300, "the server answers")
        assert [status(host) for host in ("mlflow:5000", "127.0.0.1:5000", "elsewhere:5000")] == ["200", "200", "403"]

"""The steps of the Dockerfile, taken one by one in a clean root: a Debian with nothing installed."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.support.checkout import ROOT
from tests.support.clean_root import clean_root
from tests.support.runs import write_config, write_data


def context() -> dict[str, Path]:
    """What the build is sent: what git has, less what Dockerfile.dockerignore leaves out."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    lines = (ROOT / "docker" / "Dockerfile.dockerignore").read_text().splitlines()
    kept = tuple(line[1:] for line in lines if line.startswith("!"))
    return {name: ROOT / name for name in tracked if name in kept or name.startswith(tuple(f"{k}/" for k in kept))}


@pytest.mark.exhaustive
def test_the_image_is_built_and_trains(tmp_path: Path) -> None:
    """Debian in the place of NVIDIA's base, whose CUDA no step needs; as the user that the image says."""
    root = clean_root(tmp_path)
    root.build((ROOT / "docker" / "Dockerfile").read_text(), context(), {"BASE": "debian:12-slim"})
    assert root.start().returncode == 0
    assert "ssam-scale" in root.start().stdout
    assert root.run("id", "-u").stdout.split() == [root.user]
    work = tmp_path / root.home.lstrip("/")
    write_data(work)
    write_config(work / "run.yaml", Path(root.home), store=False, train={"epochs": 1})  # a store is the user's to make
    config = (work / "run.yaml").read_text().replace(str(work), root.home)
    (work / "run.yaml").write_text(config)
    for words in (("doctor", "--config", "run.yaml"), ("train", "--config", "run.yaml")):
        done = root.start(*words)
        assert done.returncode == 0, done.stdout
    assert (work / "checkpoints" / "result.json").exists()
    assert {path.stat().st_uid for path in (work / "checkpoints").iterdir()} == {int(root.user)}
    # Whoever runs it otherwise than as themselves cannot change what is installed.
    assert root.run("touch", "/opt/ssam_scale/x").returncode != 0

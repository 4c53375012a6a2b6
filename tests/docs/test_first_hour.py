"""docs/first-hour.md: every command of it, in its order, in one shell, on few images."""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path

import pytest

from tests.support.checkout import ROOT, copy_tree
from tests.support.images import make_image_folder
from tests.support.processes import run

PAGE = (ROOT / "docs" / "first-hour.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
CLASSES = 4

# What the page says, and what takes its place so that it takes minutes; each is there.
SHORTER = {
    "bash launch/quickstart.sh\n": "bash launch/quickstart.sh --short\n",
    "checkpoints/quickstart/sam/epoch_0040": "checkpoints/quickstart-short/sam/epoch_0001",
    "export IMAGES=~/images\n": "",
    "num_classes: 10}": f"num_classes: {CLASSES}}}",
    "  subset: null ": "  batch_size: 32\n  eval_batch_size: 24\n  subset: null ",
    "train: {epochs: 20}": "train: {epochs: 2, eval_epochs: 1}\nschedule: {warmup_epochs: 1}",
    "seeds: [0, 1, 2]": "seeds: [0]",
}


def shortened(text: str) -> str:
    for said, instead in SHORTER.items():
        text = text.replace(said, instead)
    return text


def test_everything_on_the_page_is_run() -> None:
    assert {kind for kind, _ in BLOCKS} == {"bash", "yaml"}
    assert all(said in PAGE for said in SHORTER)
    assert all(re.match(r"# [a-z]+\.yaml\n", body) for kind, body in BLOCKS if kind == "yaml")


@pytest.mark.exhaustive  # some twenty processes, one after another
@pytest.mark.timeout(2400)
def test_the_first_hour(tmp_path: Path) -> None:
    home = copy_tree(tmp_path / "home")
    (home / ".venv").symlink_to(ROOT / ".venv")
    for part, count, seed in (("train", 16, 0), ("val", 6, 1)):
        make_image_folder(tmp_path / "images" / part, CLASSES, count, (40, 48), seed)
    script = ["set -e", f"export IMAGES={shlex.quote(str(tmp_path / 'images'))}"]
    for number, (kind, body) in enumerate(BLOCKS):
        script.append(f"echo block {number}")
        if kind == "bash":
            script.append(shortened(body))
        else:
            name = body.split("\n", 1)[0].removeprefix("# ")
            script.append(f"cat > {name} <<'END'\n{shortened(body)}END")
    path = os.pathsep.join([str(home), os.environ.get("PYTHONPATH", "")])
    environment = {"PYTHONPATH": path, "LAUNCHER": "torchrun", "PROCESSES": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = run(["bash", "-c", "\n".join(script)], cwd=home, env=environment, timeout=2400)
    assert done.returncode == 0, done.stdout[-6000:]
    assert f"block {len(BLOCKS) - 1}" in done.stdout

    results = {path.parent.name for path in home.glob("checkpoints/methods/*/result.json")}
    assert results == {f"{method}-seed-0" for method in ("base", "sam", "late", "small")}
    assert json.loads((home / "checkpoints/mine-tuned/result.json").read_text())["method"] == "ssam-depth"
    for made in (
        "methods.html",
        "confusions.png",
        "predictions.csv",
        "exported/model.safetensors",
        "sharpness/curve.svg",
    ):
        assert (home / made).stat().st_size > 0, made
    assert len((home / "predictions.csv").read_text().splitlines()) == 1 + CLASSES * 6

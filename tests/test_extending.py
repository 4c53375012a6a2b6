"""What a new schedule, mask and score take: in a copy of the package, these files and nothing else."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ssam_scale

SCHEDULE = '''
"""The radius is halved."""
from ssam_scale.perturbation.schedules.interface import register_schedule

@register_schedule("half of rho", "nowhere")
def build(section, steps):
    return lambda step, group: 0.5
'''

MASK = '''
"""The first parameter."""
from ssam_scale.config.mask_sections import FirstMask
from .plan import Plan
from .registry import register_mask

class First:
    def check(self, layout):
        pass

    def plan(self, layout, step):
        return Plan.of_parameters(layout, list(layout.shapes)[:1])

@register_mask(FirstMask, "the first parameter")
def build(section, run):
    return First()
'''

SECTION = '''
class FirstMask(Section):
    """The first parameter."""

    pattern: Literal["first"] = Field(description="the first parameter")


Mask: TypeAlias = Annotated[
    FirstMask | '''

SCORE = '''
"""The sign of a weight."""
from .registry import register_score

@register_score("sign", "sign of the weight")
def sign(request):
    return [s.weight.sign().float() for s in request.sharding.shards(list(request.parameters.values()))]
'''

USE = """
import json, sys
from pathlib import Path
from ssam_scale.config.load import dump, load
from ssam_scale.masks import RunInfo, build_mask
from ssam_scale.perturbation.scores import SCORES
from ssam_scale.perturbation.schedules import build_schedule

section = load(Path(sys.argv[1])).perturbation
text = dump(load(Path(sys.argv[1])))
assert "rho_schedule: half" in text and "pattern: first" in text, text
element = load(Path(sys.argv[1]), ["perturbation.mask={pattern: element, score: sign}"]).perturbation.mask
print(json.dumps({
    "mask": type(build_mask(section.mask, RunInfo(0, 10, 5))).__name__,
    "radius": build_schedule(section, 10)(3, {}),
    "score": element.score,
    "scores": list(SCORES),
}))
"""

CONFIG = """
model: {name: resnet18}
data: {train: t.beton, val: v.beton, batch_size: 8}
optimizer: {lr: 0.1}
train: {epochs: 1}
perturbation: {rho: 0.1, rho_schedule: half, mask: {pattern: first}}
"""


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1, (path, old)
    path.write_text(text.replace(old, new))


@pytest.mark.slow
def test_a_schedule_takes_one_file_and_a_mask_and_a_score_two(tmp_path: Path) -> None:
    package = tmp_path / "ssam_scale"
    shutil.copytree(Path(ssam_scale.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "perturbation/schedules/radius/half.py").write_text(SCHEDULE)
    (package / "masks/first.py").write_text(MASK)
    (package / "perturbation/scores/sign.py").write_text(SCORE)
    sections = package / "config/mask_sections.py"
    edit(sections, "\nMask: TypeAlias = Annotated[\n    ", SECTION)
    edit(sections, "Literal[SampleScore, ", 'Literal[SampleScore, "sign", ')
    config = tmp_path / "run.yaml"
    config.write_text(CONFIG)

    def python(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        return subprocess.run(
            [sys.executable, *arguments], capture_output=True, text=True, cwd=tmp_path, env=environment
        )

    done = python("-c", USE, str(config))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["mask"], found["radius"], found["score"]) == ("First", 0.5, "sign")
    assert "sign" in found["scores"]
    done = python("-m", "ssam_scale", "list", "schedules", "half", "--json")
    assert json.loads(done.stdout) == [{"name": "half", "summary": "half of rho", "paper": "nowhere"}]
    config.write_text(CONFIG.replace("rho_schedule: half", "rho_schedule: halv"))
    done = python("-m", "ssam_scale", "train", "--config", "run.yaml", "--print-config")
    assert done.returncode == 2
    assert "run.yaml:6: perturbation.rho_schedule: must be constant, cosine, half or lr, given" in done.stderr
    assert "did you mean half?" in done.stderr

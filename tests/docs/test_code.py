"""Code in the pages: Python compiles and uses names that exist, the README's loop runs, overrides are accepted."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

import ssam_scale
from ssam_scale.cli.main import app
from ssam_scale.config.load import load
from tests.support.pages import ROOT, Block, Page, pages
from tests.support.processes import run

PYTHON = [(page, block) for page in pages() for block in page.blocks if block.language == "python"]
SHELL = [(page, block) for page in pages() for block in page.blocks if block.language == "bash"]
SETTINGS = (
    "model",
    "data",
    "loss",
    "optimizer",
    "schedule",
    "perturbation",
    "sharding",
    "train",
    "checkpoint",
    "tracking",
    "sharpness",
)


def place(case: tuple[Page, Block]) -> str:
    return f"{case[0].name}:{case[1].line}"


@pytest.mark.parametrize("case", PYTHON, ids=place)
def test_python_compiles_and_uses_names_and_arguments_that_exist(case: tuple[Page, Block]) -> None:
    tree = ast.parse(case[1].code)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "ssam_scale":
            module = importlib.import_module(node.module)
            assert not [alias.name for alias in node.names if not hasattr(module, alias.name)]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ssam_scale.__all__:
            given = {keyword.arg for keyword in node.keywords}
            known = inspect.signature(getattr(ssam_scale, node.func.id)).parameters
            assert given <= known.keys(), f"{node.func.id} has no {given - known.keys()}"


def test_the_loop_of_the_readme_runs() -> None:
    [block] = [block for page, block in PYTHON if page.name == "README.md"]
    torch.manual_seed(0)
    names = {"loader": [(torch.randn(2, 3, 32, 32), torch.tensor([1, 2])) for _ in range(2)]}
    exec(compile(block.code, "README.md", "exec"), names)
    opt, loss = names["opt"], names["loss"]
    assert opt.steps == 2
    assert loss.isfinite()


PRELUDE = """
from typing import Literal
import torch
from pydantic import Field
from ssam_scale import SparseSAM
from ssam_scale.config.section import Section
"""
USES = """
from types import SimpleNamespace
from ssam_scale.masks.registry import MASKS
from ssam_scale.perturbation.schedules import RADIUS_SCHEDULES

model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 1))
mask = MASKS["bias"].value(BiasMask(pattern="bias"), RunInfo(seed=0, steps=10, steps_per_epoch=5))
schedule = LinearRadius(10, 0.5)
opt = SparseSAM(model, torch.optim.SGD(model.parameters(), lr=0.1), rho=0.1, mask=mask, schedule=schedule)
for _ in range(5):
    opt.step(lambda forward, batch: forward(batch).square().mean(), torch.randn(8, 4))
print(sorted(opt.report.plan.weights), round(opt.report.radius, 6), "__main__" in RADIUS_SCHEDULES)
PrintSkipped().after_step(SimpleNamespace(step=5), opt.report)
PrintSkipped().on_end(None)
"""


@pytest.mark.slow
def test_what_extending_adds_works(tmp_path: Path) -> None:
    """The mask, the schedule and the hook of the page, in a process of their own: they register themselves."""
    blocks = [block.code for page, block in PYTHON if page.name == "docs/extending.md"]
    script = tmp_path / "extended.py"
    script.write_text(PRELUDE + "\n".join(blocks) + USES)
    done = run([sys.executable, script], cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines()[-1] == "['0.bias', '2.bias'] 0.08 True"


def lines() -> Iterator[tuple[str, list[str]]]:
    """Overrides that the pages show, with where."""
    for page, block in SHELL:
        for line in block.code.replace("\\\n", " ").splitlines():
            overrides = [word for word in shlex.split(line, comments=True) if is_override(word)]
            if overrides:
                yield page.name, overrides
    for page in pages():
        for literal in page.literals:
            words = shlex.split(literal) if is_override(literal.lstrip("'")) else []
            if words and all(is_override(word) for word in words) and "HOST" not in literal:
                yield page.name, words


def is_override(word: str) -> bool:
    return re.match(rf"({'|'.join(SETTINGS)})(\.\w+)*=\S", word) is not None


@pytest.mark.parametrize(
    ("page", "overrides"), [pytest.param(*case, id=f"{case[0]}: {' '.join(case[1])}") for case in lines()]
)
def test_overrides_are_accepted(page: str, overrides: list[str]) -> None:
    backend = ["sharding.backend=fsdp2"] if any("replicas" in word for word in overrides) else []
    load(ROOT / "configs" / "resnet50.yaml", [*backend, "perturbation.norm=masked", *overrides])


def commands() -> Iterator[tuple[str, list[str]]]:
    """Words behind `ssam-scale` in the pages, with where."""
    for page in pages():
        shown = [line for block in page.blocks if block.language == "bash" for line in block.code.splitlines()]
        for text in [*shown, *page.literals]:
            if found := re.search(r"\bssam-scale ([a-z].*)", text):
                yield page.name, [word for word in found[1].split() if word != "|"]


@pytest.mark.parametrize(
    ("page", "words"), [pytest.param(*case, id=f"{case[0]}: {' '.join(case[1])}") for case in commands()]
)
def test_commands_and_their_options_exist(page: str, words: list[str]) -> None:
    command: Any = typer.main.get_command(app)
    for word in words:
        if hasattr(command, "commands"):
            assert word in command.commands, f"{page}: {command.name} has no command {word}"
            command = command.commands[word]
        elif word.startswith("--"):
            options = {option for parameter in command.params for option in parameter.opts}
            assert word in options, f"{page}: {command.name} has no option {word}"


def test_commands_are_scripts_that_exist() -> None:
    for page, block in SHELL:
        for name in re.findall(r"(?:bash|sbatch[^\n]*?) ((?:launch|slurm)/[\w/.]+)", block.code):
            assert Path(ROOT / name).exists(), f"{page.name} calls {name}"

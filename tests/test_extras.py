"""What `pip install .` alone serves for, and the line where a package of an extra is missing."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from ssam_scale.__main__ import extra_of

pytestmark = pytest.mark.slow

OPTIONAL = (
    "accelerate cv2 deepspeed ffcv lightning matplotlib mlflow PIL rich safetensors tensorboard timm torchvision typer "
    "wandb yaml"
)

# None is what Python takes for "not to be found".
BLOCK = "import sys\nsys.modules |= dict.fromkeys(sys.argv.pop(1).split())\n"

STEP = """
import copy
import torch
from torch import nn
from ssam_scale import Depth, Scored, SparseSAM, Stage, StagedModel

def loss_fn(forward, batch):
    return nn.functional.cross_entropy(forward(batch[0]), batch[1])

torch.manual_seed(0)
blocks = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4))
batch = torch.randn(16, 8), torch.randint(4, (16,))
for mask in (None, Depth(), Scored("row", sparsity=0.5)):
    net = copy.deepcopy(blocks)
    model = StagedModel(net, [Stage(str(n), block, block) for n, block in enumerate(net)])
    opt = SparseSAM(model, torch.optim.SGD(model.parameters(), lr=0.1), rho=0.1, mask=mask)
    before = loss_fn(model, batch)
    if isinstance(mask, Scored):
        opt.refresh(loss_fn, batch)
    for _ in range(3):
        opt.step(loss_fn, batch)
    assert loss_fn(model, batch) < before
print("trained")
"""


def with_nothing_but(code: str, blocked: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", BLOCK + code, blocked, *arguments], capture_output=True, text=True)


def test_sparse_sam_needs_nothing_but_torch_numba_and_pydantic() -> None:
    done = with_nothing_but(STEP, OPTIONAL)
    assert done.stdout == "trained\n", done.stderr


@pytest.mark.parametrize(
    ("missing", "extra", "command"),
    [
        ("typer", "train", ["train", "--help"]),
        ("timm", "train", ["list", "models"]),
        ("yaml", "train", ["train", "--config", "configs/quickstart.yaml", "--print-config"]),
    ],
)
def test_a_command_names_what_it_lacks_and_the_extra(missing: str, extra: str, command: list[str]) -> None:
    done = with_nothing_but("from ssam_scale.__main__ import main; main(sys.argv[1:])", missing, *command)
    assert done.returncode == 2, done.stderr
    assert done.stderr == (
        f"ssam-scale: error: {missing} is not installed; bash launch/setup.sh installs all that commands need, "
        f"pip install 'ssam_scale[{extra}]' what pip can (docs/install.md)\n"
    )


MAIN = "from ssam_scale.__main__ import main; main(sys.argv[1:])"


def test_versions_and_help_need_no_extra() -> None:
    done = with_nothing_but(MAIN, OPTIONAL, "--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == with_nothing_but(MAIN, "", "--version").stdout
    for asked in ([], ["--help"]):
        done = with_nothing_but(MAIN, OPTIONAL, *asked)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.count("\n") == 1
        assert "typer is not installed; bash launch/setup.sh installs" in done.stdout


def test_the_first_example_says_what_it_needs() -> None:
    script = Path(__file__).parents[1] / "examples/plain_loop.py"
    code = (
        f"import runpy; sys.path.insert(0, {str(script.parent)!r}); runpy.run_path({str(script)!r}, None, '__main__')"
    )
    done = with_nothing_but(code, OPTIONAL)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"(timm|torchvision) is not installed: pip install '\.\[train\]' brings it\n", done.stderr)


@pytest.mark.parametrize(
    ("module", "extra"),
    [("deepspeed.runtime.zero", "zero"), ("cv2", "train"), ("PIL.Image", "train"), ("torch", None), ("no_such", None)],
)
def test_modules_belong_to_extras(module: str, extra: str | None) -> None:
    assert extra_of(module) == extra


def requirements_of(extra: str) -> Iterator[Requirement]:
    """What an extra of ours lists, and what the extras that it names list."""
    for line in requires("ssam_scale") or ():
        requirement = Requirement(line)
        if requirement.marker is None or not requirement.marker.evaluate({"extra": extra}):
            continue
        if requirement.name.replace("-", "_") == "ssam_scale":
            for further in requirement.extras:
                yield from requirements_of(further)
        elif "extra" in str(requirement.marker):
            yield requirement


def test_all_that_development_needs_is_installed() -> None:
    """Or tests of what is missing would be skipped without a word."""
    wanted = list(requirements_of("dev"))
    assert {"pytest", "mlflow", "deepspeed", "onnx", "tensorboard"} <= {requirement.name for requirement in wanted}

    def is_there(requirement: Requirement) -> bool:
        try:
            return requirement.specifier.contains(version(requirement.name), prereleases=True)
        except PackageNotFoundError:
            return False

    assert [str(requirement) for requirement in wanted if not is_there(requirement)] == []

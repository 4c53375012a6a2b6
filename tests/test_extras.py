"""What `pip install .` alone serves for, and the line where a package of an extra is missing."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ssam_scale.__main__ import extra_of

OPTIONAL = "accelerate cv2 deepspeed ffcv lightning matplotlib mlflow PIL rich safetensors timm torchvision typer yaml"

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
        ("typer", "train", ["--help"]),
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


@pytest.mark.parametrize(
    ("module", "extra"),
    [("deepspeed.runtime.zero", "zero"), ("cv2", "train"), ("PIL.Image", "train"), ("torch", None), ("no_such", None)],
)
def test_modules_belong_to_extras(module: str, extra: str | None) -> None:
    assert extra_of(module) == extra

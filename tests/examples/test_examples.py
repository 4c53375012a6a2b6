"""Every example as a reader runs it: each a process of its own, in an empty folder; two where it says so."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.support.processes import free_ports, run

EXAMPLES = Path(__file__).parents[2] / "examples"
ALONE = ["plain_loop", "coming_from_sam", "own_model"]
LAUNCHED = ["fsdp2_loop", "deepspeed_loop"]
IN_LOOPS_OF_OTHERS = {
    "accelerate_loop": "accelerate",
    "lightning_loop": "lightning",
    "transformers_trainer": "transformers",
}
# Two CPU processes on any machine; one with a GPU less than them would refuse.
ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def output_of(command: list[str | Path], folder: Path) -> str:
    done = run(command, cwd=folder, env=ENVIRONMENT, timeout=300)
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_every_example_is_run_and_short_enough_to_read() -> None:
    scripts = {path.stem: path for path in EXAMPLES.glob("*.py")}
    assert scripts.keys() == {*ALONE, *LAUNCHED, *IN_LOOPS_OF_OTHERS, "fashion_mnist"}
    for path in scripts.values():
        assert len(path.read_text().splitlines()) <= 80, path


@pytest.mark.slow
def test_plain_loop(tmp_path: Path) -> None:
    output = output_of([sys.executable, EXAMPLES / "plain_loop.py"], tmp_path)
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", output)]
    assert len(losses) == 2
    assert losses[1] < losses[0]
    assert (tmp_path / "plain_loop.pt").exists()


@pytest.mark.slow
def test_coming_from_sam(tmp_path: Path) -> None:
    output = output_of([sys.executable, EXAMPLES / "coming_from_sam.py"], tmp_path)
    apart = [float(value) for value in re.findall(r"weights within (\S+)", output)]
    assert len(apart) == 3
    assert max(apart) <= 1e-6  # the same arithmetic in fp32


@pytest.mark.slow
@pytest.mark.parametrize("example", IN_LOOPS_OF_OTHERS)
def test_in_loops_of_others(example: str, tmp_path: Path) -> None:
    pytest.importorskip(IN_LOOPS_OF_OTHERS[example])
    output = output_of([sys.executable, EXAMPLES / f"{example}.py"], tmp_path)
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", output)]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    assert "without SAM" not in output


@pytest.mark.slow
def test_own_model(tmp_path: Path) -> None:
    output = output_of([sys.executable, EXAMPLES / "own_model.py"], tmp_path)
    times = {name: float(value) for name, value in re.findall(r"^(.+): ([\d.]+) times", output, re.MULTILINE)}
    assert times.keys() == {"base", "dense SAM", "cut at 2/3"}
    # 2 and 1.33 by the count of passes; other programs may run beside it.
    assert times["cut at 2/3"] < times["dense SAM"]


@pytest.mark.slow
def test_fsdp2_loop_under_torchrun(tmp_path: Path) -> None:
    output = output_of(torchrun("fsdp2_loop"), tmp_path)
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", output)]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    assert (tmp_path / "fsdp2_loop_checkpoint" / ".metadata").exists()


@pytest.mark.slow
def test_deepspeed_loop_under_deepspeeds_launcher(tmp_path: Path) -> None:
    arguments = ["--num_gpus", "2", "--master_port", str(free_ports(1)[0]), EXAMPLES / "deepspeed_loop.py"]
    output = output_of([sys.executable, "-m", "deepspeed.launcher.runner", *arguments], tmp_path)
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", output)]
    assert len(losses) == 3
    assert losses[-1] < losses[0]
    assert (tmp_path / "deepspeed_loop_checkpoint" / "latest").exists()


def torchrun(example: str) -> list[str | Path]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    return [*launcher, "--master_port", str(free_ports(1)[0]), EXAMPLES / f"{example}.py"]

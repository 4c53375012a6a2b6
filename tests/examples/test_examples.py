"""Every example as a reader runs it: each a process of its own, in an empty folder; two where it says so."""

from __future__ import annotations

import copy
import importlib
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ssam_scale import Depth, SparseSAM
from tests.support.processes import free_ports, run

EXAMPLES = Path(__file__).parents[2] / "examples"
ALONE = ["plain_loop", "coming_from_sam", "own_model", "lora", "finetune"]
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
def test_finetune(tmp_path: Path) -> None:
    """It is fitted to the other classes too, which its first weights have never seen."""
    output = output_of([sys.executable, EXAMPLES / "finetune.py"], tmp_path)
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", output)]
    assert len(losses) == 4
    assert losses[1] < losses[0]
    assert losses[3] < losses[2]
    weights = torch.load(tmp_path / "finetuned.pt", weights_only=True)
    assert weights["fc.weight"].shape[0] == 5


@pytest.mark.slow
def test_coming_from_sam(tmp_path: Path) -> None:
    output = output_of([sys.executable, EXAMPLES / "coming_from_sam.py"], tmp_path)
    apart = [float(value) for value in re.findall(r"weights within (\S+)", output)]
    assert len(apart) == 3
    assert max(apart) <= 1e-6  # the same arithmetic in fp32


@pytest.mark.exhaustive  # of one of these loops there are more cases below
@pytest.mark.parametrize("example", IN_LOOPS_OF_OTHERS)
def test_in_loops_of_others(example: str, tmp_path: Path) -> None:
    pytest.importorskip(IN_LOOPS_OF_OTHERS[example])
    output = output_of([sys.executable, EXAMPLES / f"{example}.py"], tmp_path)
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", output)]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    assert "without SAM" not in output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("images", "accumulation"),
    [*(pytest.param(*case, marks=pytest.mark.exhaustive) for case in ((64, 1), (96, 3))), (80, 2)],
)  # the last: a rest of one
def test_transformers_accumulates_for_both_passes(
    images: int, accumulation: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As plain SparseSAM does with the same micro-batches; the epoch's last step may have fewer."""
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(EXAMPLES)
    import ssam_scale.models  # noqa: F401 - before torchvision

    # isort: split
    from transformers import TrainingArguments
    from transformers_trainer import Classifier, SAMTrainer

    torch.manual_seed(0)
    model = Classifier()
    model.net.insert(2, torch.nn.Dropout(0.5))
    plain, taken = copy.deepcopy(model), []

    class Recorded(SAMTrainer):
        def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *more: Any) -> torch.Tensor:
            taken.append((dict(inputs), torch.get_rng_state()))
            return super().training_step(model, inputs, *more)

    def optimizer(of: torch.nn.Module, **options: Any) -> SparseSAM:
        return SparseSAM(of, torch.optim.SGD(of.parameters(), lr=0.1, momentum=0.9), rho=0.5, **options)

    opt = optimizer(model)
    arguments = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=16,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=1,
        max_grad_norm=0.5,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
    )
    data: Any = [{"x": torch.randn(1, 28, 28), "labels": torch.tensor(i % 10)} for i in range(images)]
    constant = torch.optim.lr_scheduler.ConstantLR(opt, factor=1.0)
    Recorded(model=model, args=arguments, train_dataset=data, optimizers=(opt, constant)).train()
    assert len(taken) == images // 16
    assert opt.steps == -(-len(taken) // accumulation)

    def loss_fn(forward: Any, batch: dict[str, Any]) -> torch.Tensor:
        loss: torch.Tensor = forward(**batch)["loss"]
        return loss

    theirs = optimizer(plain, max_grad_norm=0.5)
    for first in range(0, len(taken), accumulation):
        step = taken[first : first + accumulation]
        torch.set_rng_state(step[0][1])
        theirs.step(loss_fn, *(batch for batch, _ in step))
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)  # fp32: the mean is taken before or after the sum


@pytest.mark.exhaustive
def test_lora(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    output = output_of([sys.executable, EXAMPLES / "lora.py"], tmp_path)
    [[trained, total]] = re.findall(r"([\d,]+) of ([\d,]+) weights are trained", output)
    assert int(trained.replace(",", "")) < 0.1 * int(total.replace(",", ""))
    first, last = (float(loss) for loss in re.findall(r"loss ([\d.]+)", output))
    assert last < first
    saved = torch.load(tmp_path / "lora.pt", weights_only=True)
    assert {name.split(".")[-2] for name in saved} == {"lora_A", "lora_B", "head"}


@pytest.mark.slow
def test_own_model(tmp_path: Path) -> None:
    output = output_of([sys.executable, EXAMPLES / "own_model.py"], tmp_path)
    times = {name: float(value) for name, value in re.findall(r"^(.+): ([\d.]+) times", output, re.MULTILINE)}
    assert times.keys() == {"base", "dense SAM", "cut at 2/3"}
    assert times["base"] == 1.0
    assert min(times.values()) > 0.0


def test_its_cut_runs_what_comes_before_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the times that it prints come from, on a machine where nothing else runs."""
    monkeypatch.syspath_prepend(EXAMPLES)
    own_model = importlib.import_module("own_model")
    passes = {}
    for name, mask in {"dense SAM": None, "cut": Depth((2 / 3, 2 / 3))}.items():
        model, ran = own_model.in_stages(own_model.RowReader()), []
        for index, stage in enumerate(model.stages):
            stage.block.register_forward_hook(lambda *_, index=index, ran=ran: ran.append(index))
        opt = SparseSAM(model, torch.optim.AdamW(model.parameters()), rho=0.05, mask=mask)
        opt.step(own_model.loss_fn, (torch.randn(4, 1, 28, 28), torch.arange(4)))
        passes[name] = [ran.count(index) for index in range(6)]
    assert passes == {"dense SAM": [2, 2, 2, 2, 2, 2], "cut": [1, 1, 1, 1, 2, 2]}


@pytest.mark.exhaustive
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

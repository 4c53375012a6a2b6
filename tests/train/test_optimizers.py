"""All of timm's optimizers: what a checkpoint holds of one is all that its next steps go by; what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ssam_scale.models  # noqa: F401  timm can be imported then
from ssam_scale.cli.main import main
from ssam_scale.perturbation import SparseSAM
from ssam_scale.perturbation.arguments import check_optimizer
from ssam_scale.train import optimizer as optimizers
from ssam_scale.train.checkpoint import OptimizerState, check_savable
from ssam_scale.train.checkpoint.parts import join, split
from tests.support.processes import free_port
from tests.support.ranks import start_fresh_rank
from tests.support.runs import ssam_scale as command
from tests.support.runs import write_config

STEPS = 3


def every() -> list[str]:
    from timm.optim import list_optimizers

    return list(list_optimizers())


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 4))


def optimizer(name: str, net: nn.Module) -> SparseSAM:
    """Skips what this machine cannot build, and what `SparseSAM` says it does not work with."""
    from timm.optim import create_optimizer_v2

    try:
        base = create_optimizer_v2(net, opt=name, lr=1e-3, weight_decay=1e-2)
        check_optimizer(base)
        check_savable(create_optimizer_v2(network(), opt=name, lr=1e-3))
        return SparseSAM(net, base, rho=0.05)
    except (AssertionError, ImportError, TypeError, ValueError) as error:
        pytest.skip(str(error))


def step(opt: SparseSAM, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    batch = torch.randn(16, 6, generator=generator), torch.randint(0, 4, (16,), generator=generator)
    torch.manual_seed(number)
    opt.step(lambda forward, batch: F.cross_entropy(forward(batch[0]), batch[1]), batch)


@pytest.mark.slow
@pytest.mark.parametrize("name", every())
def test_what_is_saved_is_all_that_the_next_steps_go_by(name: str) -> None:
    first = network()
    opt = optimizer(name, first)
    for number in range(STEPS):
        step(opt, number)
    tensors: dict[str, Tensor] = {}
    state = json.loads(json.dumps(split(OptimizerState(first, opt).state_dict(), tensors)))
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    weights = {key: tensor.clone() for key, tensor in first.state_dict().items()}

    second = network()
    again = optimizer(name, second)
    OptimizerState(second, again).load_state_dict(join(state, tensors))
    second.load_state_dict(weights)
    again.steps = STEPS
    for number in range(STEPS, STEPS + 3):
        step(opt, number)
        step(again, number)
    for one, two in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, two)
    # What an optimizer draws by itself goes on, too, however seldom it is looked at.
    for own in ("rng",):
        if hasattr(opt.base_optimizer, own):
            assert getattr(opt.base_optimizer, own).getstate() == getattr(again.base_optimizer, own).getstate()


@pytest.mark.slow
def test_an_optimizer_that_cannot_be_saved_is_refused_before_anything_is_built(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import timm.optim

    class Sets(timm.optim.Lion):  # type: ignore[misc]
        """An optimizer that remembers what JSON cannot."""

        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    self.state[p]["seen"] = {1, 2}

    def made(config: Any, net: nn.Module) -> torch.optim.Optimizer:
        return Sets(net.parameters())

    monkeypatch.setattr(optimizers, "base_optimizer", made)
    config = write_config(tmp_path / "run.yaml", data, optimizer={"name": "lion", "lr": 0.01})
    assert command("train", "--config", config) == 2
    said = capsys.readouterr().err
    assert "optimizer.name lion: a checkpoint cannot hold state.0.seen, which is a set; these can be saved: " in said
    savable = set(said.rpartition(": ")[2].strip().split(", "))
    assert {"sgd", "adamw", "kron", "lamb"} <= savable
    assert not {"lbfgs", "adahessian", "adafactorbv"} & savable


@pytest.mark.slow
def test_timms_that_cannot_be_saved_are_refused(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path / "run.yaml", data, optimizer={"name": "adafactorbv", "lr": 0.01})
    assert command("train", "--config", config) == 2
    said = capsys.readouterr().err
    assert "adafactorbv: a checkpoint cannot hold param_groups.0.momentum_dtype, which is a dtype; these can" in said


@pytest.mark.slow
def test_one_that_cannot_step_shards_is_refused_by_all_processes_before_the_model(data: Path, home: Path) -> None:
    config = write_config(home / "run.yaml", data, optimizer={"name": "sgdp", "lr": 0.01})
    overrides = ["sharding.backend=fsdp2", "model.name=no_such_model"]
    logs, port = [home / f"{rank}.log" for rank in range(2)], free_port()
    arguments = ["train", "--config", str(config), *overrides]
    processes = [start_fresh_rank(rank, 2, port, log, main, arguments) for rank, log in enumerate(logs)]
    for process, log in zip(processes, logs, strict=True):
        process.join(300)
        process.kill()  # which has no effect on one that has ended
        said = log.read_text()
        assert process.exitcode == 2, said
        (line,) = [line for line in said.splitlines() if "error:" in line]
        assert "optimizer.name sgdp on sharding.backend fsdp2: SGDP, as it is set up, does not step shards" in line
        assert line.endswith("; use SGD, AdamW, Lion or another that treats every weight alike, or DDP")
        assert "Traceback" not in said
    assert {path.name for path in home.iterdir()} == {"run.yaml", "mlflow.db", "0.log", "1.log"}

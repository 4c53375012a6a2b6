"""What a run does where a loss is not finite: it ends, leaves the step out, or goes back."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ssam_scale.cli.main import main
from ssam_scale.config.schema import Config
from ssam_scale.masks import Depth
from ssam_scale.perturbation import Friendly, Previous, SparseSAM
from ssam_scale.sharding import World
from ssam_scale.sharding.chunks import gathered
from ssam_scale.sharding.place import place
from ssam_scale.train import build
from tests.support.networks import batches, part, small_network
from tests.support.ranks import alone, run_fresh_ranks, run_ranks
from tests.support.runs import VIT, differing, ssam_scale, train_on_ranks, write_config
from tests.support.tiers import few

BATCH = 8
STEPS_PER_EPOCH = 4  # of `write_config`: 48 images in batches of 12
SHARED = ["ddp", "fsdp2", "zero1", "zero2", "zero3"]
DIVERGES = ("data.std=[1e-42,1e-42,1e-42]",)  # images that overflow, whose loss is not finite from the first step on


def odd_step(world: World, backend: str, options: dict[str, Any]) -> tuple[list[str], list[bool]]:
    """Names of what a step changes that is not finite on the last process alone; and which steps were left out."""
    model = small_network("resnet")
    distributed, base = place(
        model,
        [stage.block for stage in model.stages],
        backend,
        world,
        lambda: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        batch_size=BATCH // world.size,
        max_grad_norm=None,
    )
    opt = SparseSAM(distributed, base, rho=0.1, skip_nonfinite=True, **options)
    odd = False

    def loss_fn(forward: Any, batch: Any) -> torch.Tensor:
        loss = F.cross_entropy(forward(batch[0]), batch[1])
        return loss * float("nan") if odd and world.rank == world.size - 1 else loss

    def state() -> dict[str, torch.Tensor]:
        named, sharding = opt.parameters.by_name, opt.sharding
        shards = sharding.shards(list(named.values()))
        found = {n: sharding.gather(p, s.weight).clone() for (n, p), s in zip(named.items(), shards, strict=True)}
        kept = gathered(sharding.named_optimizer_state(model.model, opt.base_optimizer)).get("state", {})
        found |= {f"{n}|{e}": v.clone() for n, own in kept.items() for e, v in own.items() if torch.is_tensor(v)}
        found |= {f"buffer {n}": b.clone() for n, b in model.named_buffers()}
        for name, value in opt.sparse.state_dict().items():
            each = value if isinstance(value, dict) else {"": value}
            found |= {
                f"sparse {name} {n}": v.clone() for n, v in each.items() if torch.is_tensor(v) and name != "steps"
            }
        return found

    changed: list[str] = []
    left_out = []
    for step, batch in enumerate(batches(4, BATCH)):
        odd = step == 2
        before = state()
        opt.step(loss_fn, part(batch, world.rank, world.size))
        assert opt.report is not None
        left_out.append(opt.report.left_out)
        after = state()
        if odd:
            changed = [n for n in before if not torch.equal(before[n].nan_to_num(7.0), after[n].nan_to_num(7.0))]
    assert all(bool(v.isfinite().all()) for n, v in state().items() if not n.startswith("sparse"))
    return changed, left_out


OPTIONS: dict[str, dict[str, Any]] = {
    "dense": {},
    "cut": {"mask": Depth((0.5, 0.5))},
    "friendly": {"direction": Friendly()},
    "previous": {"direction": Previous()},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_step_that_is_left_out_changes_nothing_on_one_process(options: dict[str, Any]) -> None:
    assert alone(odd_step, "single", options) == ([], [False, False, True, False])


@pytest.mark.parametrize("backend", few(SHARED, "fsdp2", "zero3"))
def test_a_step_is_left_out_on_all_processes_alike(backend: str) -> None:
    for options in OPTIONS.values():
        assert run_ranks(2, odd_step, backend, options) == [([], [False, False, True, False])] * 2


def test_averaged_weights_and_counts(data: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Images that overflow at once: all later steps are left out, until there are too many in a row."""
    config = write_config(home / "run.yaml", data, train={"on_nonfinite": "skip", "max_skips": 3, "ema_decay": 0.9})
    assert ssam_scale("train", "--config", config, *DIVERGES) == 2
    said = capsys.readouterr()
    assert "3 steps in a row up to step" in said.err
    assert said.out.count("is left out: its loss or gradient is not finite") == 3


@pytest.mark.slow
def test_a_run_goes_back_as_often_as_it_may_however_often_it_is_resumed(
    data: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(home / "run.yaml", data, train={"epochs": 3, "on_nonfinite": "rollback", "max_rollbacks": 2})
    assert ssam_scale("train", "--config", config, *DIVERGES) == 2
    assert "there is no checkpoint to go back to yet" in capsys.readouterr().err
    assert ssam_scale("train", "--config", config, "train.epochs=1") == 0
    capsys.readouterr()
    assert ssam_scale("train", "--config", config, "--resume", "auto", *DIVERGES) == 2
    said = capsys.readouterr()
    assert said.out.count("epoch_0001 (1 of 2), and on in another order") == 1
    assert said.out.count("epoch_0001 (2 of 2), and on in another order") == 1
    assert "going back 2 times has not (train.max_rollbacks)" in said.err
    assert json.loads((home / "checkpoints/.rollbacks.json").read_text()) == [[1, 0], [1, 0]]
    assert ssam_scale("train", "--config", config, "--resume", "auto", *DIVERGES) == 2
    assert "going back 2 times has not" in capsys.readouterr().err
    assert ssam_scale("train", "--config", config, "--resume", "auto") == 0


def diverging_once(arguments: list[str]) -> None:
    """`ssam-scale` on a rank; the loss of its first step in the second epoch is no number, on the last rank alone."""
    made, calls = build.soft_loss, itertools.count(1)

    def soft_loss(config: Config, *others: Any) -> Any:
        loss_fn = made(config, *others)

        def diverging(forward: Any, batch: Any) -> torch.Tensor:
            loss = loss_fn(forward, batch)
            odd = next(calls) == 2 * STEPS_PER_EPOCH + 1 and os.environ["RANK"] == "1"  # two passes a step
            return loss * float("nan") if odd else loss

        return diverging

    pytest.MonkeyPatch().setattr(build, "soft_loss", soft_loss)  # the process ends with this
    main(arguments)


@pytest.mark.slow
@pytest.mark.parametrize("backend", few(SHARED, "zero3"))
def test_a_run_that_went_back_is_one_resumed_from_there_in_the_other_order(
    backend: str, data: Path, home: Path
) -> None:
    """Bit for bit, on two processes; the oracle has a copy of the checkpoint, and knows of the rollback alone.

    Three whole runs, each by processes of its own.
    """
    config = write_config(
        home / "run.yaml",
        data,
        model=VIT,
        perturbation={"rho": 0.05},
        sharding={"backend": backend},
        train={"on_nonfinite": "rollback", "epochs": 2},
    )
    database = (home / "mlflow.db").read_bytes()
    said = run_fresh_ranks(2, diverging_once, ["train", "--config", str(config)])
    assert said.count("epoch_0001 (1 of 3), and on in another order") == 1
    rollbacks = home / "checkpoints" / ".rollbacks.json"
    assert json.loads(rollbacks.read_text()) == [[1, 0]]
    for name in ("oracle", "undisturbed"):
        (home / f"{name}.db").write_bytes(database)
        shutil.copytree(home / "checkpoints" / "epoch_0001", home / name / "epoch_0001")
        if name == "oracle":
            shutil.copy(rollbacks, home / name)
        places = f"checkpoint.directory={home}/{name}", f"tracking.uri=sqlite:///{home}/{name}.db"
        train_on_ranks(2, config, *places, "checkpoint.resume=auto")
    assert differing(home / "oracle" / "epoch_0002", home / "checkpoints" / "epoch_0002") == []
    assert differing(home / "undisturbed" / "epoch_0002", home / "checkpoints" / "epoch_0002") != []

"""Of a checkpoint every byte is what was written, or it is not used; an interrupted one never looks whole."""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from ssam_scale.config.load import load
from ssam_scale.config.schema import Checkpoint, Config
from ssam_scale.errors import UserError
from ssam_scale.perturbation import no_phases
from ssam_scale.sharding import World
from ssam_scale.train import checkpoint
from ssam_scale.train.build import Components, build
from ssam_scale.train.checkpoint.files import Snapshot, problem_with, read_state, state_text, write
from ssam_scale.train.checkpoint.folder import best, drop_old
from tests.support.damage import flipped
from tests.support.processes import free_port, wait_until
from tests.support.ranks import start_fresh_rank
from tests.support.runs import VIT, run_length, write_config

FLIPS = 12  # in each file, beside the first and the last bit

SECTIONS: dict[str, Any] = {
    "model": VIT,
    "optimizer": {"name": "adamw", "lr": 1e-3},
    "train": {"epochs": 3, "ema_decay": 0.5},
    "perturbation": {"rho": 0.05, "mask": {"pattern": "element", "score": "weight"}},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, data: Path) -> tuple[Config, Components]:
    """A run with checkpoints after the first and within the second epoch."""
    home = tmp_path_factory.mktemp("saved")
    config = load(write_config(home / "run.yaml", data, **SECTIONS), ["checkpoint.resume=auto"])
    components = build(config, World(), no_phases, run_length(config))
    components.opt.refresh()
    batches = iter(components.train)
    components.opt.step(components.loss_fn, next(batches))
    batches.close()
    components.progress.seen = components.progress.length.images
    components.progress.after_epoch()
    checkpoint.save(config, World(), components)
    components.progress.after_step()
    components.unrecorded.losses = [torch.tensor(0.5)]
    checkpoint.save(config, World(), components)
    return config, components


@pytest.fixture
def run(saved: tuple[Config, Components], tmp_path: Path) -> tuple[Config, Components]:
    """The same, in a folder of its own."""
    config, components = saved
    shutil.copytree(config.checkpoint.directory, tmp_path / "checkpoints")
    section = config.checkpoint.model_copy(update={"directory": tmp_path / "checkpoints"})
    return config.model_copy(update={"checkpoint": section}), components


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_every_flipped_bit_is_noticed_and_the_checkpoint_before_is_used(run: tuple[Config, Components]) -> None:
    config, _ = run
    older, newer = checkpoint.checkpoints(config.checkpoint.directory)
    assert newer.name == "epoch_0001_step_000001"
    assert checkpoint.resolve(config, World()) == (newer, [])
    explicit = config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"resume": str(newer)})})
    draw = random.Random(0)
    files = sorted(newer.iterdir())
    parts = ("ema", "model", "optimizer", "sparse", "unrecorded")
    assert [file.name for file in files] == sorted(["state.json", *(f"{name}.safetensors" for name in parts)])
    for file in files:
        raw = file.read_bytes()
        bits = 8 * len(raw)
        for bit in (0, bits - 1, *(draw.randrange(bits) for _ in range(FLIPS))):
            file.write_bytes(flipped(raw, bit))
            path, said = checkpoint.resolve(config, World())
            assert path == older, f"bit {bit} of {file.name}"
            (line,) = said
            assert line.startswith(f"checkpoint {newer} cannot be used: {file.name}" if file.suffix != ".json" else "")
            assert line.endswith(f"; {older} is used instead")
        with pytest.raises(UserError, match=f"{newer.name} cannot be read"):
            checkpoint.resolve(explicit, World())
        for damaged in (raw[:-1], raw + b"\0", b""):
            file.write_bytes(damaged)
            assert problem_with(newer, World()) is not None
        file.unlink()
        assert problem_with(newer, World()) is not None
        file.write_bytes(raw)
    assert problem_with(newer, World()) is None


def test_where_all_are_damaged_nothing_begins_anew_unasked(run: tuple[Config, Components]) -> None:
    config, _ = run
    for path in checkpoint.checkpoints(config.checkpoint.directory):
        (path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"step_000001 cannot be used: model\.safetensors .*and none of 1 older.* anew"):
        checkpoint.resolve(config, World())


def test_what_does_not_belong_together_is_noticed(run: tuple[Config, Components]) -> None:
    """Whole files, with the digests of what is in them, that a person has put together."""
    config, _ = run
    path = checkpoint.newest(config.checkpoint.directory)
    assert path is not None
    state = read_state(path)
    parts = state["parts"]
    for changed, problem in (
        ({"parts": {**parts, "sparse": {**parts["sparse"], "more": {"$tensor": "more"}}}}, "more is missing"),
        ({"parts": {**parts, "unrecorded": {}}}, "losses is too much"),
        ({"files": {k: v for k, v in state["files"].items() if k[0] != "e"}}, "ema.safetensors is not listed"),
        ({"files": None}, "has no"),
    ):
        (path / "state.json").write_text(state_text({**state, **changed}))
        assert problem in str(problem_with(path, World()))


def test_weights_that_are_not_finite_are_never_the_newest(run: tuple[Config, Components]) -> None:
    config, components = run
    before = names(config.checkpoint.directory)
    weight = next(iter(components.network.parameters()))
    components.progress.after_step()
    for value in (float("nan"), float("inf")):
        kept = weight.detach().clone()
        with torch.no_grad():
            weight.view(-1)[7] = value
        with pytest.raises(UserError, match=r"is not finite after epoch_0001_step_000002.*step_000001 is sound.*lr"):
            checkpoint.save(config, World(), components)
        with torch.no_grad():
            weight.copy_(kept)
    assert names(config.checkpoint.directory) == before
    # Written by somebody else: not used.
    path = checkpoint.newest(config.checkpoint.directory)
    assert path is not None
    tensors = {"model": {"w": torch.tensor([1.0, float("nan")])}}
    write(Snapshot(tensors, {**read_state(path), "parts": {"model": {"w": {"$tensor": "w"}}}}), path)
    assert problem_with(path, World()) == "model.safetensors: w is not finite"


def small(directory: Path, name: str, top1: float | None = None, loss: float = 1.0) -> Path:
    evaluation = None if top1 is None else {"top1": top1, "top5": None, "loss": loss, "images": 5}
    state = {"format": 5, "evaluation": evaluation, "parts": {"model": {"w": {"$tensor": "w"}}}}
    write(Snapshot({"model": {"w": torch.ones(3)}}, state), directory / name)
    return directory / name


def kept(directory: Path, **section: Any) -> list[str]:
    drop_old(Checkpoint(directory=directory, **section))
    return names(directory)


def test_which_are_kept(tmp_path: Path) -> None:
    every = [
        small(tmp_path, f"epoch_{n:04d}", top1) for n, top1 in enumerate([None, 50.0, 70.0, 70.0, 60.0, None, 61.0])
    ]
    within = small(tmp_path, "epoch_0006_step_000070")
    assert best(every, "top1") == tmp_path / "epoch_0003"
    assert best(every, "top5") is None
    assert best(
        [small(tmp_path / "loss", f"epoch_{n:04d}", 1.0, loss) for n, loss in enumerate((2.0, 1.5, 3.0))], "loss"
    ) == (tmp_path / "loss/epoch_0001")
    shutil.rmtree(tmp_path / "loss")
    (tmp_path / "unsent_1").mkdir()  # somebody else's
    assert kept(tmp_path, keep=3, keep_best="top1", keep_every=2) == [
        *(f"epoch_000{n}" for n in (2, 3, 4, 5, 6)),
        within.name,
        "unsent_1",
    ]
    assert kept(tmp_path, keep=1) == [within.name, "unsent_1"]


def test_what_an_interruption_leaves_is_no_checkpoint(tmp_path: Path) -> None:
    whole = small(tmp_path, "epoch_0001")
    shutil.copytree(whole, tmp_path / ".epoch_0002.partial")
    shutil.copytree(whole, tmp_path / ".epoch_0000.deleted")
    assert checkpoint.checkpoints(tmp_path) == [whole]
    small(tmp_path, "epoch_0002")
    assert kept(tmp_path, keep=1) == [".epoch_0000.deleted", "epoch_0002"]


def write_many(directory: Path, first: int) -> None:
    """Writes and deletes until it is killed."""
    for epoch in range(first, 10**6):
        small(directory, f"epoch_{epoch:04d}")
        drop_old(Checkpoint(directory=directory, keep=2))


@pytest.mark.slow
def test_whenever_a_process_is_killed_all_that_look_like_checkpoints_are_whole(tmp_path: Path) -> None:
    draw, last = random.Random(0), -1
    for attempt in range(6):
        process = start_fresh_rank(0, 1, free_port(), tmp_path / "log", write_many, tmp_path, last + 1)
        before = newest_place(tmp_path)
        wait_until(lambda before=before: newest_place(tmp_path) > before, 120, "a checkpoint")  # type: ignore[misc]
        time.sleep(draw.uniform(0.0, 0.03))  # at any place of the next ones
        process.kill()
        process.join()
        every = checkpoint.checkpoints(tmp_path)
        assert [problem_with(path, World()) for path in every] == [None] * len(every), attempt
        assert len(every) >= 2 or last < 0
        last = newest_place(tmp_path)


def newest_place(directory: Path) -> int:
    path = checkpoint.newest(directory)
    return -1 if path is None else int(path.name.removeprefix("epoch_"))

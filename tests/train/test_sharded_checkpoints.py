"""A checkpoint that each process writes its own chunks of is the one that the first would have written, in pieces."""

from __future__ import annotations

import random
import resource
import shutil
import signal
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ssam_scale.config.load import load
from ssam_scale.errors import UserError
from ssam_scale.perturbation import no_phases
from ssam_scale.sharding import World
from ssam_scale.sharding.chunks import Chunk
from ssam_scale.train import checkpoint
from ssam_scale.train.build import build
from ssam_scale.train.checkpoint.files import problem_with, read_state, state_text
from ssam_scale.train.checkpoint.layout import saved_sharded
from ssam_scale.train.checkpoint.parts import split
from ssam_scale.train.checkpoint.saved import FileTensor, Piece
from tests.support.damage import flipped
from tests.support.ranks import run_ranks
from tests.support.runs import VIT, differing, run_length, ssam_scale, tensors_of, train_on_ranks, write_config
from tests.support.tiers import few

# Every part that has tensors of the weights' shape: averages, what a direction remembers, an optimizer's state.
EVERYTHING: dict[str, Any] = {
    "model": {**VIT, "drop_path_rate": 0.1},
    "optimizer": {"name": "adamw", "lr": 1e-3},
    "train": {"epochs": 2, "ema_decay": 0.9, "max_micro_batch": 3},
    "perturbation": {
        "rho": 0.05,
        "direction": {"source": "friendly"},
        "mask": {"pattern": "element", "score": "accumulated", "refresh_steps": 3},
    },
    "trajectory": {"kind": "mesa", "start_epoch": 0},
    "checkpoint": {"every_steps": 3, "keep": 20},
}
BACKENDS = {
    "fsdp2": ["sharding.backend=fsdp2"],
    "zero1": ["sharding.backend=zero1"],
    "zero2": ["sharding.backend=zero2"],
    "zero3": [
        "sharding.backend=zero3",
        "sharding.deepspeed={zero_optimization: {stage3_param_persistence_threshold: 1}}",
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("backend", few(BACKENDS, "fsdp2"))
def test_it_is_the_whole_one_in_pieces_and_a_run_goes_on_from_it(backend: str, data: Path, tmp_path: Path) -> None:
    config, where = write_config(tmp_path / "run.yaml", data, **EVERYTHING), BACKENDS[backend]
    for layout in ("whole", "sharded"):
        train_on_ranks(2, config, *where, f"checkpoint.format={layout}", f"checkpoint.directory={tmp_path}/{layout}")
    places = sorted(path.name for path in (tmp_path / "whole").glob("epoch_*"))
    assert sorted(path.name for path in (tmp_path / "sharded").glob("epoch_*")) == places
    assert not list((tmp_path / "sharded").glob(".*.partial"))
    for place in places:
        assert differing(tmp_path / "whole" / place, tmp_path / "sharded" / place) == []
    within = next(place for place in places if "step" in place)
    files = {path.name for path in (tmp_path / "sharded" / within).iterdir()}
    for part in ("model", "optimizer", "ema", "trajectory", "sparse"):
        assert {f"{part}.rank_0000{rank}.safetensors" for rank in (0, 1)} <= files
        # Neither process has written much more than its half.
        sizes = [
            (tmp_path / "sharded" / within / f"{part}.rank_0000{rank}.safetensors").stat().st_size for rank in (0, 1)
        ]
        assert max(sizes) < 0.7 * sum(sizes), part

    # Bit for bit, from within an epoch, on as many processes; whatever it is saved as from then on.
    start = f"checkpoint.resume={tmp_path}/sharded/{within}"
    train_on_ranks(2, config, *where, start, "checkpoint.format=whole", f"checkpoint.directory={tmp_path}/again")
    assert differing(tmp_path / "whole/epoch_0002", tmp_path / "again/epoch_0002") == []

    # On one process, and on three with other weights in other places, as from the whole one.
    for processes, name in ((1, "one"), (3, "three")):
        ended = []
        for layout in ("whole", "sharded"):
            folder = tmp_path / f"{name}_{layout}"
            more = [f"checkpoint.resume={tmp_path}/{layout}/epoch_0001", f"checkpoint.directory={folder}"]
            if processes == 1:
                assert ssam_scale("train", "--config", config, *more) == 0
            else:
                train_on_ranks(processes, config, *where, *more, f"checkpoint.format={layout}")
            ended.append(folder / "epoch_0002")
        assert differing(*ended) == [], name

    # And as full tensors for timm.
    assert ssam_scale("consolidate", tmp_path / "sharded/epoch_0002", tmp_path / "full") == 0
    model = load_file(tmp_path / "full/epoch_0002/model.safetensors")
    kept = load_file(tmp_path / "whole/epoch_0002/model.safetensors")
    assert model.keys() == kept.keys()
    assert all(torch.equal(model[name], kept[name]) for name in kept)
    assert problem_with(tmp_path / "full/epoch_0002", World()) is None


@pytest.mark.slow
def test_of_several_copies_of_a_shard_one_is_saved(data: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", data, model=VIT, train={"epochs": 1})
    hybrid = ["sharding.backend=fsdp2", "sharding.replicas=2", "checkpoint.format=sharded"]
    train_on_ranks(4, config, *hybrid)
    saved = tmp_path / "checkpoints/epoch_0001"
    assert {path.name for path in saved.glob("model.*")} == {f"model.rank_0000{rank}.safetensors" for rank in (0, 1)}
    assert ssam_scale("train", "--config", config, "--resume", "auto", "train.epochs=2") == 0


def saved_by_ranks(world: World, config: Path, where: list[str], limit: int | None) -> list[str]:
    """Saves twice, the second time with files of the last rank limited to so many bytes; what each rank then says."""
    loaded = load(config, [*where, "checkpoint.format=sharded"])
    components = build(loaded, world, no_phases, run_length(loaded))
    checkpoint.save(loaded, world, components)
    components.progress.after_step()
    if limit is None:
        return []
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if world.rank == world.size - 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(UserError) as raised:
            checkpoint.save(loaded, world, components)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    found = sorted(path.name for path in loaded.checkpoint.directory.iterdir())
    checkpoint.save(loaded, world, components)  # and there is nothing in the way of the next
    return [str(raised.value), *found]


def test_one_rank_without_room_leaves_nothing_and_says_so_on_all(data: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", data, **EVERYTHING)
    said = run_ranks(2, saved_by_ranks, config, BACKENDS["fsdp2"], 20_000)
    for line, *found in said:
        assert "epoch_0000_step_000001 was not written: " in line
        assert "File too large" in line
        assert found == ["epoch_0000"]
    assert problem_with(tmp_path / "checkpoints/epoch_0000_step_000001", World()) is None


def saved_and_loaded(world: World, config: Path, where: list[str]) -> list[str]:
    """Saves after a step in both ways; what differs in another run after loading the sharded one."""
    components = {}
    for seed, layout in ((1, "whole"), (1, "sharded"), (2, "sharded")):
        directory = f"checkpoint.directory={config.parent}/{layout}"
        loaded = load(config, [*where, f"checkpoint.format={layout}", directory, f"train.seed={seed}"])
        if seed not in components:
            components[seed] = build(loaded, world, no_phases, run_length(loaded))
            components[seed].opt.refresh()
            batches = iter(components[seed].train)
            components[seed].opt.step(components[seed].loss_fn, next(batches))
            batches.close()
            components[seed].progress.after_step()
        if seed == 1:
            checkpoint.save(loaded, world, components[seed])
    checkpoint.load(config.parent / "sharded/epoch_0000_step_000001", loaded, components[2])
    states = [{name: part.state_dict() for name, part in components[seed].state.items()} for seed in (1, 2)]
    tensors: list[dict[str, Any]] = [{}, {}]
    for state, found in zip(states, tensors, strict=True):
        for name, part in state.items():
            split(part, found, name)
    assert tensors[0].keys() == tensors[1].keys()
    return [name for name, t in tensors[0].items() if not torch.equal(t.nan_to_num(), tensors[1][name].nan_to_num())]


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_saves_the_same_and_takes_it_back(backend: str, data: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", data, **EVERYTHING)
    assert run_ranks(2, saved_and_loaded, config, BACKENDS[backend]) == [[], []]
    whole, sharded = (tmp_path / layout / "epoch_0000_step_000001" for layout in ("whole", "sharded"))
    assert differing(whole, sharded) == []


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """Of two processes."""
    home = tmp_path_factory.mktemp("sharded")
    run_ranks(2, saved_by_ranks, write_config(home / "run.yaml", data, **EVERYTHING), BACKENDS["fsdp2"], None)
    return home / "checkpoints/epoch_0000"


def test_every_file_is_verified(saved: Path, tmp_path: Path) -> None:
    path, draw = tmp_path / "epoch_0000", random.Random(0)
    shutil.copytree(saved, path)
    assert problem_with(path, World()) is None
    files = sorted(path.iterdir())
    assert len(files) >= 11
    for file in files:
        raw = file.read_bytes()
        for bit in (0, 8 * len(raw) - 1, draw.randrange(8 * len(raw))):
            file.write_bytes(flipped(raw, bit))
            assert str(problem_with(path, World())).startswith(file.name)
        for damaged in (raw[:-1], raw + b"\0", b""):
            file.write_bytes(damaged)
            assert problem_with(path, World()) is not None
        file.unlink()
        assert problem_with(path, World()) is not None
        file.write_bytes(raw)
    assert problem_with(path, World()) is None


def test_pieces_that_do_not_make_up_their_tensor_are_noticed(saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "epoch_0000"
    shutil.copytree(saved, path)
    state, other = read_state(path), "model.rank_00001.safetensors"
    name = next(name for name, run in state["files"][other]["runs"].items() if run[1])
    start, count = state["files"][other]["runs"][name]

    def changed(**more: Any) -> str | None:
        (path / "state.json").write_text(state_text({**state, **more}))
        return problem_with(path, World())

    def with_run(run: Any) -> dict[str, Any]:
        said = state["files"][other]
        return {**state["files"], other: {**said, "runs": {**said["runs"], name: run}}}

    assert f"{other}: {name} does not have the" in str(changed(files=with_run([start, count + 1])))
    assert f"model: {name} is in pieces that do not fit at element" in str(changed(files=with_run([start + 1, count])))
    assert f"model: {name} is in pieces that do not fit at element" in str(changed(files=with_run([0, count])))
    shapes = {**state["shapes"], "model": {**state["shapes"]["model"], name: [7, 11, 13]}}
    assert f"model: {name} has {start + count:,} elements instead of 1,001" in str(changed(shapes=shapes))
    without = {key: said for key, said in state["files"].items() if key != other}
    assert f"model: {name} has " in str(changed(files=without))
    none = {key: said for key, said in state["files"].items() if not key.startswith("model")}
    assert "is in no file" in str(changed(files=none))


@given(
    shape=st.lists(st.integers(1, 5), max_size=3).map(tuple),
    cuts=st.sets(st.integers(0, 125), max_size=4),
    ends=st.tuples(st.integers(0, 125), st.integers(0, 125)),
)
def test_any_run_of_a_tensor_is_read_from_whatever_pieces(
    tmp_path_factory: pytest.TempPathFactory, shape: tuple[int, ...], cuts: set[int], ends: tuple[int, int]
) -> None:
    """From one file that has it in its shape, and from files that have runs of it, empty ones among them."""
    folder = tmp_path_factory.mktemp("pieces")
    full = torch.arange(torch.Size(shape).numel()).view(shape)
    numel = full.numel()
    save_file({"w": full}, folder / "whole")
    places = [0, *sorted(min(cut, numel) for cut in cuts), numel]
    pieces = []
    for index, (start, end) in enumerate(pairwise(places)):
        save_file({"w": full.reshape(-1)[start:end].clone()}, folder / str(index))
        pieces.append(Piece(safe_open(folder / str(index), "pt"), "w", start, end - start))
    first, last = sorted(min(end, numel) for end in ends)
    for tensor in (
        FileTensor(shape, [Piece(safe_open(folder / "whole", "pt"), "w", 0, numel)]),
        FileTensor(shape, pieces),
    ):
        assert tensor.dtype == full.dtype
        assert tensor.shape == full.shape
        assert torch.equal(tensor.whole(), full)
        assert torch.equal(tensor.run(first, last - first), full.reshape(-1)[first:last])


def test_only_what_would_not_fit_is_sharded_unasked() -> None:
    def leaves(elements: int) -> dict[str, Any]:
        chunk = Chunk(torch.zeros(1), 0, torch.Size([elements]), True, partial(torch.zeros, 1))
        return {"model": {"w": chunk}, "progress": {"t": torch.zeros(3)}}

    world = World()
    assert not saved_sharded("auto", leaves(1000), world)
    assert saved_sharded("auto", leaves(2**50), world)
    assert not saved_sharded("whole", leaves(2**50), world)
    assert saved_sharded("sharded", leaves(1000), world)
    assert not saved_sharded("sharded", {"model": {"w": torch.zeros(3)}}, world)  # every process holds everything


def test_consolidating_says_what_is_wrong(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ssam_scale("consolidate", tmp_path / "none", tmp_path) == 2
    assert "none cannot be read: state.json cannot be read" in capsys.readouterr().err
    assert ssam_scale("consolidate", saved, tmp_path) == 0
    assert tensors_of(tmp_path / "epoch_0000").keys() == tensors_of(saved).keys()
    assert differing(saved, tmp_path / "epoch_0000") == []
    capsys.readouterr()
    assert ssam_scale("consolidate", saved, tmp_path) == 2
    assert "epoch_0000 exists; name another folder" in capsys.readouterr().err

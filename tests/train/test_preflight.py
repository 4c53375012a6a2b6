"""What would cost hours is looked at before anything is built, on every machine, and by a person."""

from __future__ import annotations

import resource
import shutil
import signal
from pathlib import Path

import pytest

from ssam_scale.config.load import load
from ssam_scale.folders import why_not_writable
from ssam_scale.sharding import World
from ssam_scale.sharding.roll_call import roll_call
from ssam_scale.train.checkpoint_size import expected_bytes
from ssam_scale.train.installation import clock, cores, memory, open_files, shared_memory
from ssam_scale.train.preflight import alike, clocks, preflight, room
from ssam_scale.train.written import written_folders
from tests.support.ranks import run_ranks
from tests.support.runs import ssam_scale, write_config


def test_every_line_is_a_verdict_and_leaves_nothing(data: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(home / "run.yaml", data)
    there = sorted(home.rglob("*"))
    assert ssam_scale("doctor", "--config", config) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines} <= {"ok", "warn"}
    said = {line[6:].partition(":")[0] for line in lines}
    assert {"torch", "cores", "open files", "data.train", "checkpoints", "tracking", "room"} <= said
    assert sorted(home.rglob("*")) == there
    assert ssam_scale("doctor", "--config", config, f"data.train={home}/gone.beton", "model.name=resnet18") == 1
    assert f"fail  data.train: {home}/gone.beton: no such file; write it with" in capsys.readouterr().out


def test_misuse_is_told_from_failure(capsys: pytest.CaptureFixture[str]) -> None:
    assert ssam_scale("doctor", "train.epochs=3") == 2
    assert "an override needs a configuration" in capsys.readouterr().err


def test_all_that_a_run_writes_is_in_one_list(data: Path, home: Path) -> None:
    saf = {"kind": "saf", "lag_epochs": 1, "start_epoch": 1}
    config = load(write_config(home / "run.yaml", data, trajectory=saf, train={"epochs": 2}))
    (home / "checkpoints/unsent_1").mkdir(parents=True)
    listed = {written.folder for written in written_folders(config, "zero1")}
    assert {
        home / "checkpoints",
        home / "checkpoints/outputs",
        home / "checkpoints/unsent_1",
        home,
        home / "mlartifacts/ssam_scale",
    } <= listed


def test_a_folder_that_takes_no_bytes_cannot_be_written_to(tmp_path: Path) -> None:
    """Folders can still be made there, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        problem = why_not_writable(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert problem is not None
    assert "nothing can be made in" in problem
    assert list(tmp_path.iterdir()) == []
    assert why_not_writable(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_is_as_large_as_it_was_expected_to_be(data: Path, home: Path) -> None:
    config = write_config(home / "run.yaml", data, train={"epochs": 1, "ema_decay": 0.9})
    assert ssam_scale("train", "--config", config) == 0
    saved = sum(file.stat().st_size for file in (home / "checkpoints/epoch_0001").glob("*.safetensors"))
    # Buffers and the files' headers are not counted.
    assert expected_bytes(load(config)) == pytest.approx(saved, rel=0.35)


def test_room() -> None:
    assert room(200, 100, "there").verdict == "ok"
    found = room(199, 100, "there")
    assert (found.verdict, found.fix) == ("fail", "make room, or choose another folder")


def test_machines_are_compared() -> None:
    assert alike("versions", [("a", {"torch": "1"})]) == []
    assert [f.verdict for f in alike("versions", [("a", {"torch": "1"}), ("b", {"torch": "1"})])] == ["ok"]
    (found,) = alike("versions", [("a", {"torch": "1"}), ("b", {"torch": "1"}), ("c", {})])
    assert str(found).startswith("fail  versions: torch is 1 for a and missing for c; install the same")
    assert [f.verdict for f in clocks([("a", 100.0), ("b", 104.0)])] == ["ok"]
    (apart,) = clocks([("a", 100.0), ("b", 90.0), ("c", 130.0)])
    assert apart.verdict == "warn"
    assert "the clock of c is 40 s before that of b" in apart.said


def test_a_machine_with_too_little() -> None:
    assert cores(1, 64, None).verdict == "warn"
    assert cores(1, 1, None).verdict == "ok"
    assert memory(2**30, 2**36).verdict == "warn"
    assert memory(None, 2**36).verdict == "ok"
    assert shared_memory(Path("/nowhere")).verdict == "warn"
    assert "mode=1777" in str(shared_memory(Path("/proc")))  # there, and nobody may write to it
    assert open_files(1024, 2**20).fix == "ulimit -n 4096"
    assert "hard limit" in open_files(1024, 1024).fix
    assert clock(0.0, 10.0**9).verdict == "warn"


def called(world: World) -> str:
    return roll_call(world)


def test_every_kind_of_collective_comes_back() -> None:
    for said in run_ranks(2, called):
        assert said.startswith("broadcast, all-reduce, all-gather, reduce-scatter, all-to-all among 2 processes")


def looked(world: World, config: str) -> list[str]:
    resolved = load(Path(config), [] if world.first else [f"data.val={Path(config).parent}/other.beton"])
    return [str(finding) for finding in preflight(resolved, world).findings if finding.verdict == "fail"]


def test_another_file_on_another_machine_is_named(data: Path, home: Path) -> None:
    config = write_config(home / "run.yaml", data)
    for suffix in (".beton", ".beton.json"):
        shutil.copy(data / f"train{suffix}", home / f"other{suffix}")
    first, second = run_ranks(2, looked, str(config))
    assert first == second
    assert len(first) == 1
    assert first[0].startswith("fail  data: data.val is ")
    assert "process 1 (" in first[0]

"""Trackers beside MLflow and in its place, in real event files and offline runs, which are read back."""

from __future__ import annotations

import contextlib
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ssam_scale.config.schema import Config
from ssam_scale.errors import UserError
from ssam_scale.tracking.run import Run, open_run
from ssam_scale.tracking.store import open_store
from ssam_scale.tracking.tracker import TRACKERS
from tests.support.processes import wait_until
from tests.support.wandb_files import exit_code, history, last, run_id, wandb_files

MakeConfig = Callable[..., Config]

ASIDE = ["tensorboard", "wandb"]
PATIENCE_S = 60.0


def read(folder: Path) -> EventAccumulator:
    """What TensorBoard shows of the event files in a folder, all of it."""
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0}).Reload()


def points(folder: Path, key: str) -> dict[int, float]:
    """Values by step, of which no step has two."""
    found = read(folder / "tensorboard").Scalars(key)
    assert len({point.step for point in found}) == len(found)
    return {point.step: point.value for point in found}


def has_scalar(folder: Path, key: str, step: int) -> bool:
    found = read(folder / "tensorboard")
    return key in found.Tags()["scalars"] and found.Scalars(key)[-1].step == step


def text(folder: Path, name: str) -> str:
    tensors = read(folder / "tensorboard").Tensors(f"{name}/text_summary")
    return tensors[-1].tensor_proto.string_val[0].decode()


def log(run: Run, steps: range, value: float) -> None:
    for step in steps:
        run.log({"train/loss": value * step}, step)


def test_without_trackers_a_run_is_recorded_nowhere(config: MakeConfig, tmp_path: Path) -> None:
    resolved = config()
    untracked = Config.model_validate({**resolved.model_dump(), "tracking": None})
    assert untracked.tracking.trackers == ()
    before = set(tmp_path.iterdir())
    with open_run(untracked, enabled=True) as run:
        log(run, range(1, 4), 1.0)
        run.log_text("hello", "notes/hello.txt")
        run.no_saving("nobody asks")
        summary = run.finish_summary()
    assert (run.id, run.interface_lines(), summary) == (None, [], {})
    assert set(tmp_path.iterdir()) == before


def test_a_run_goes_on_in_the_same_places_and_has_every_step_once(config: MakeConfig, tmp_path: Path) -> None:
    """As of a process that had come to step 10 when it was killed, and of the next, which goes on from step 5."""
    resolved, folder = config(trackers=ASIDE), tmp_path / "checkpoints"
    with open_run(resolved, enabled=True) as run:
        log(run, range(1, 11), 1.0)
        run.log({"summary/top1": 1.0}, 0)
    assert run.id is None
    with open_run(resolved, enabled=True, step=5) as run:
        log(run, range(6, 13), 2.0)
        run.log({"summary/top1": 2.0}, 0)
    assert len(list((folder / "tensorboard").iterdir())) == 2
    # TensorBoard forgets what is trained again.
    assert points(folder, "train/loss") == {s: s * (1.0 if s <= 5 else 2.0) for s in range(1, 13)}
    first, second = wandb_files(folder)
    assert run_id(first) == run_id(second)
    # Weights & Biases cannot: as in MLflow, what is there stays.
    both = [(step, value) for file in (first, second) for step, value in history(file)["train/loss"]]
    assert both == [(s, s * (1.0 if s <= 10 else 2.0)) for s in range(1, 13)]
    assert last(second, "summary")["summary/top1"] == 2.0


def test_a_new_run_in_the_folder_of_one_that_saved_nothing_is_another(config: MakeConfig, tmp_path: Path) -> None:
    resolved, folder = config(trackers=ASIDE), tmp_path / "checkpoints"
    for value, steps in ((1.0, range(1, 9)), (2.0, range(1, 4))):
        with open_run(resolved, enabled=True) as run:
            log(run, steps, value)
    assert points(folder, "train/loss") == {1: 2.0, 2: 4.0, 3: 6.0}
    first, second = wandb_files(folder)
    assert run_id(first) != run_id(second)


@pytest.mark.parametrize(
    ("error", "status", "why"),
    [(None, "FINISHED", None), (ValueError("no such thing"), "FAILED", "ValueError: no such thing")],
)
def test_how_a_run_ends_is_recorded(
    config: MakeConfig, tmp_path: Path, error: Exception | None, status: str, why: str | None
) -> None:
    def end() -> None:
        with open_run(config(trackers=ASIDE), enabled=True):
            if error is not None:
                raise error

    if error is None:
        end()
    else:
        with pytest.raises(ValueError, match="no such thing"):
            end()
    folder = tmp_path / "checkpoints"
    (file,) = wandb_files(folder)
    assert text(folder, "tag/status") == status
    tags = last(file, "config")["tags"]
    assert (tags["status"], tags.get("failure"), exit_code(file)) == (status, why, 0 if error is None else 1)


def test_what_is_set_for_wandb_is_its_place_and_mode(
    config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolved, place = config(trackers=["wandb"]), tmp_path / "elsewhere"
    place.mkdir()
    monkeypatch.setenv("WANDB_DIR", str(place))
    with open_run(resolved, enabled=True) as run:
        log(run, range(1, 3), 1.0)
    (file,) = wandb_files(place)
    assert run.interface_lines() == [
        f"send the run to Weights & Biases: wandb sync {place}/wandb/offline-run-*-{run_id(file)}"
    ]
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with open_run(resolved, enabled=True) as run:
        log(run, range(1, 3), 1.0)
    assert (wandb_files(place), run.interface_lines()) == ([file], [])
    monkeypatch.setenv("WANDB_MODE", "of-line")
    with pytest.raises(UserError, match="WANDB_MODE is of-line; it may be offline, online or disabled"):
        TRACKERS["wandb"].value.check(resolved)


def test_values_that_are_no_numbers_are_kept(config: MakeConfig, tmp_path: Path) -> None:
    with open_run(config(trackers=ASIDE), enabled=True) as run:
        run.log({"train/loss": float("inf")}, 1)
    assert points(tmp_path / "checkpoints", "train/loss") == {1: float("inf")}
    (file,) = wandb_files(tmp_path / "checkpoints")
    assert history(file)["train/loss"] == [(1, float("inf"))]


def test_no_password_gets_into_their_files(config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = "http://me:s3cret@localhost:5000"
    monkeypatch.setattr(sys, "argv", ["ssam-scale", "train", f"tracking.uri={uri}"])
    with open_run(config(trackers=ASIDE, uri=uri), enabled=True) as run:
        log(run, range(1, 3), 1.0)
    files = [path for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} > {".wandb", ".json"}
    assert [path for path in files if b"s3cret" in path.read_bytes()] == []
    assert "me:***@localhost" in text(tmp_path / "checkpoints", "config")


@contextlib.contextmanager
def no_file_grows() -> Iterator[None]:
    """Within, every write to a file fails, as on a full disk."""
    limits, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)


def test_a_full_disk_is_one_line_and_the_run_goes_on(
    config: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "checkpoints"
    # The limit outlives the run, which ends within.
    with contextlib.ExitStack() as full, open_run(config(trackers=ASIDE), enabled=True) as run:
        log(run, range(1, 4), 1.0)
        wait_until(lambda: has_scalar(folder, "train/loss", 3), PATIENCE_S, "the first steps in the event file")
        full.enter_context(no_file_grows())
        log(run, range(4, 9), 1.0)
    said = [record.message for record in caplog.records if "no more of this run" in record.message]
    assert sorted(said) == [
        "TensorBoard records no more of this run, which goes on: [Errno 27] File too large",
        "Weights & Biases records no more of this run, which goes on: [Errno 27] File too large",
    ]
    assert points(folder, "train/loss") == {1: 1.0, 2: 2.0, 3: 3.0}


ENDS = """
import sys
from pathlib import Path
import psutil
from ssam_scale.config.schema import Config
from ssam_scale.tracking.run import open_run

config = Config.model_validate_json(Path(sys.argv[1]).read_text())
with open_run(config, enabled=True) as run:
    run.log({"train/loss": 1.0}, 1)
    (service,) = [child for child in psutil.Process().children() if child.name() == "wandb-core"]
    service.kill()
    service.wait()
    for step in range(2, 9):
        run.log({"train/loss": 1.0}, step)
print("trained", run.id)
"""


@pytest.mark.slow
def test_where_the_service_of_one_dies_the_others_record_on(
    config: MakeConfig, uri: str, tmp_path: Path, child_environment: dict[str, str]
) -> None:
    resolved = config(trackers=["mlflow", "wandb", "tensorboard"])
    (tmp_path / "config.json").write_text(resolved.model_dump_json())
    done = subprocess.run(
        [sys.executable, "-c", ENDS, tmp_path / "config.json"], env=child_environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (id_,) = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("trained")]
    assert done.stderr.count("Weights & Biases records no more of this run, which goes on") == 1
    stored = open_store(uri, create=False)
    assert stored.get_run(id_).info.status == "FINISHED"
    assert len(stored.get_metric_history(id_, "train/loss")) == 8
    assert len(points(tmp_path / "checkpoints", "train/loss")) == 8


def test_what_cannot_be_opened_is_an_error_before_the_run(config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "tensorboard").write_text("no folder")
    with (
        pytest.raises(UserError, match=r"tracking.trackers: TensorBoard cannot record: .*File exists"),
        open_run(config(trackers=["tensorboard"]), enabled=True),
    ):
        pytest.fail("it was opened")


def test_of_the_processes_that_do_not_track_there_are_no_files(config: MakeConfig, tmp_path: Path) -> None:
    with open_run(config(trackers=ASIDE), enabled=False) as run:
        log(run, range(1, 3), 1.0)
    assert not (tmp_path / "checkpoints").exists()

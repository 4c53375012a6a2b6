"""A job that is started again and again without coming further ends with the reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ssam_scale.config.load import load
from ssam_scale.config.schema import Config
from ssam_scale.errors import UserError
from ssam_scale.sharding import World
from ssam_scale.train.checkpoint.starts import NAME, Restarts, note_start
from tests.support.configs import SMALL


@pytest.fixture
def config(tmp_path: Path) -> Config:
    (tmp_path / "given.yaml").write_text(SMALL)
    (tmp_path / "checkpoints").mkdir()
    return load(tmp_path / "given.yaml", [f"checkpoint.directory={tmp_path}/checkpoints"])


class Job:
    """A job of Slurm's."""

    def __init__(self, config: Config, monkeypatch: pytest.MonkeyPatch, number: str = "7") -> None:
        self.config, self.patch, self.number, self.starts = config, monkeypatch, number, 0

    def start(self, resumed: str | None) -> None:
        """As often as it is called, from this checkpoint."""
        self.patch.setenv("SLURM_JOB_ID", self.number)
        self.patch.setenv("SLURM_RESTART_COUNT", str(self.starts))
        self.starts += 1
        directory = self.config.checkpoint.directory
        note_start(self.config, World(), None if resumed is None else directory / resumed)


@pytest.fixture
def job(config: Config, monkeypatch: pytest.MonkeyPatch) -> Job:
    for name in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    return Job(config, monkeypatch)


@pytest.mark.parametrize(("place", "said"), [(None, "the beginning"), ("epoch_0003", "epoch_0003")])
def test_two_starts_without_progress_are_enough(job: Job, place: str | None, said: str) -> None:
    job.start(place)
    job.start(place)
    with pytest.raises(UserError, match=rf"job 7 is at {said} at its start number 3, as it was at the two before"):
        job.start(place)


def test_a_job_that_comes_further_goes_on(job: Job) -> None:
    for place in (None, None, "epoch_0001", "epoch_0001", "epoch_0001_step_000009", "epoch_0002", "epoch_0002"):
        job.start(place)


def test_whoever_starts_a_job_anew_knows_why(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(4):
        Job(job.config, monkeypatch, "8").start(None)


def test_another_jobs_starts_do_not_count(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    job.start(None)
    job.start(None)
    other = Job(job.config, monkeypatch, "8")
    other.starts = 1
    other.start(None)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"job": "7"}', '{"job": "7", "places": 3}'])
def test_a_damaged_note_is_none(job: Job, text: str) -> None:
    (job.config.checkpoint.directory / NAME).write_text(text)
    job.starts = 1
    job.start(None)
    assert json.loads((job.config.checkpoint.directory / NAME).read_text()) == {"job": "7", "places": ["the beginning"]}


def test_without_a_launcher_nothing_is_noted(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    note_start(config, World(), None)
    assert not (config.checkpoint.directory / NAME).exists()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Restarts("", 0)),
        ({"SLURM_JOB_ID": "7"}, Restarts("7", 0)),
        ({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2"}, Restarts("7", 2)),
        ({"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "0"}, Restarts("of torchrun", 0)),
        ({"TORCHELASTIC_RUN_ID": "a", "TORCHELASTIC_RESTART_COUNT": "1"}, Restarts("a", 1)),
        (
            {
                "SLURM_JOB_ID": "7",
                "SLURM_RESTART_COUNT": "1",
                "TORCHELASTIC_RUN_ID": "7",
                "TORCHELASTIC_RESTART_COUNT": "1",
            },
            Restarts("7/7", 2),
        ),
    ],
)
def test_which_start_of_which_job_it_is(environment: dict[str, str], expected: Restarts) -> None:
    assert Restarts.of(environment) == expected

"""Projects that are moved or copied with their stores: artifacts are read and written where the files are."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ssam_scale.config.schema import Config
from ssam_scale.errors import UserError
from ssam_scale.tracking.compare import compare
from ssam_scale.tracking.run import open_run
from ssam_scale.tracking.store import experiment_id, open_store, text_artifact

MakeConfig = Callable[..., Config]


@pytest.fixture
def project(config: MakeConfig, uri: str, tmp_path: Path) -> tuple[Path, str]:
    """A project's folder with a run in its store, and the run's id."""
    folder = tmp_path / "old place"
    folder.mkdir()
    shutil.move(tmp_path / "mlflow.db", folder)
    with open_run(config(uri=f"sqlite:///{folder}/mlflow.db"), enabled=True) as run:
        run.log({"summary/step_time": 0.1}, 0)
    assert run.id is not None
    return folder, run.id


def artifacts_below(folder: Path) -> list[str]:
    return sorted(path.parts[-3] for path in folder.rglob("config.yaml"))


@pytest.mark.parametrize("first", ["compare", "train", "resume"])
def test_a_moved_project_keeps_its_artifacts(
    first: str, config: MakeConfig, project: tuple[Path, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old, run_id = project
    new = old.rename(tmp_path / "new place")
    uri = f"sqlite:///{new}/mlflow.db"
    from mlflow.tracking._tracking_service import utils

    utils._artifact_repos_cache.clear()  # as in another process
    if first == "compare":
        assert len(compare(uri, "ssam_scale").rows) == 1
    else:
        with open_run(config(uri=uri), enabled=True, resume_run_id=run_id if first == "resume" else None) as run:
            pass
        assert artifacts_below(new) == sorted({run_id, str(run.id)})
    [told] = [record.getMessage() for record in caplog.records if "was moved" in record.getMessage()]
    assert f"recorded in {new}/mlartifacts/ssam_scale from now on, no longer in {old}/mlartifacts/ssam_scale" in told
    assert not old.exists()
    assert "resnet18" in str(text_artifact(open_store(uri, create=False), run_id, "config.yaml"))


def test_a_copied_project_writes_to_its_own_place(
    config: MakeConfig, project: tuple[Path, str], tmp_path: Path
) -> None:
    old, run_id = project
    new = Path(shutil.copytree(old, tmp_path / "copy"))
    with open_run(config(uri=f"sqlite:///{new}/mlflow.db"), enabled=True) as run:
        pass
    assert artifacts_below(new) == sorted([run_id, str(run.id)])
    assert artifacts_below(old) == [run_id]


def test_a_link_to_the_project_is_no_other_place(
    config: MakeConfig, project: tuple[Path, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "link").symlink_to(project[0])
    experiment_id(
        open_store(uri := f"sqlite:///{tmp_path}/link/mlflow.db", create=False), uri, config().tracking.experiment
    )
    assert not caplog.records


def test_a_place_of_which_nothing_is_here_is_refused(uri: str, tmp_path: Path) -> None:
    client, gone = open_store(uri, create=False), tmp_path / "gone" / "there" / "x"
    client.create_experiment("elsewhere", str(gone))
    with pytest.raises(UserError, match=f"artifacts in {gone}, of which nothing is here; .*: mkdir -p {gone}$"):
        experiment_id(client, uri, "elsewhere")
    gone.mkdir(parents=True)
    experiment_id(client, uri, "elsewhere")


def test_a_folder_that_was_moved_is_refused(config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    with open_run(config(uri=f"file:{tmp_path}/old/mlruns"), enabled=True):
        pass
    (tmp_path / "old").rename(tmp_path / "new")
    with pytest.raises(UserError, match=f"keeps its artifacts in {tmp_path}/old/mlruns/.*of which nothing is here"):
        open_run(config(uri=f"file:{tmp_path}/new/mlruns"), enabled=True).__enter__()
    assert not (tmp_path / "old").exists()

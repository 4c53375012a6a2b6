"""A run whose images are in no .beton file, or in several, is the run that it would be with one."""

from __future__ import annotations

import re
from pathlib import Path

import mlflow
import pytest
import yaml

from ssam_scale.config.load import dump, load
from ssam_scale.data import open_images, write_beton
from ssam_scale.data.shard import Shard
from tests.support.runs import differing, ssam_scale, train_on_ranks, write_config


def datasets(home: Path) -> dict[str, tuple[str, str]]:
    """Name and digest of what the one run of a store has logged, by what it was for."""
    client = mlflow.MlflowClient(f"sqlite:///{home}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("ssam_scale").experiment_id])
    return {each.tags[0].value: (each.dataset.name, each.dataset.digest) for each in run.inputs.dataset_inputs}


@pytest.mark.slow
def test_a_folder_trains_as_the_file_written_of_it(data: Path, home: Path) -> None:
    """Bit for bit, also from within an epoch, and on two processes."""
    config = write_config(
        home / "run.yaml", data, loss={"mixup": 0.2}, checkpoint={"every_steps": 1, "keep": 20}, train={"epochs": 2}
    )
    folder = [f"data.train=folder:{data}/train", f"data.val=folder:{data}/val"]
    assert ssam_scale("train", "--config", config, f"tracking.uri=sqlite:///{home}/other.db") == 0
    (home / "checkpoints").rename(home / "of_file")
    assert ssam_scale("train", "--config", config, *folder) == 0
    (home / "checkpoints").rename(home / "of_folder")
    assert differing(home / "of_file/epoch_0002", home / "of_folder/epoch_0002") == []
    place = f"checkpoint.resume={home}/of_folder/epoch_0001_step_000006"
    assert ssam_scale("train", "--config", config, place, f"tracking.uri=sqlite:///{home}/third.db", *folder) == 0
    assert differing(home / "of_file/epoch_0002", home / "checkpoints/epoch_0002") == []
    assert datasets(home) == {
        context: (name, open_images(Path(f"folder:{data}/{name}")).fingerprint)
        for context, name in (("training", "train"), ("validation", "val"))
    }
    for name, overrides in (("file", []), ("folder", folder)):
        own = [f"checkpoint.directory={home}/two_{name}", f"tracking.uri=sqlite:///{home}/two_{name}.db"]
        train_on_ranks(2, config, *overrides, *own)
    assert differing(home / "two_file/epoch_0002", home / "two_folder/epoch_0002") == []


def test_what_is_said_before_a_run_of_a_folder(data: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(home / "run.yaml", data)
    folder = f"data.train=folder:{data}/train"
    assert ssam_scale("train", "--config", config, folder, "--dry-run") == 0
    assert "holds the images" not in capsys.readouterr().out
    assert ssam_scale("train", "--config", config, folder, f"data.val=folder:{data}/train", "--dry-run") == 0
    assert f"data.val folder:{data}/train holds the images of data.train" in capsys.readouterr().out
    assert ssam_scale("doctor", "--config", config, folder, "model.name=resnet18") == 0
    assert f"data.train: folder:{data}/train: 48 images" in capsys.readouterr().out.replace("\n", " ")
    assert ssam_scale("train", "--config", config, folder, "--print-config") == 0
    assert yaml.safe_load(capsys.readouterr().out)["data"]["train"] == f"folder:{data}/train"
    for override, told in {
        "data.order=pages": "order: pages is of .beton files, and train is folder:; use random",
        f"data.train={data}/train": f"write {data}/train FILE`, or read it as it is: folder:{data}/train",
        "data.train=folder:nowhere": "nowhere: no such folder",
        "data.val=folder:nowhere": "nowhere: no such folder",
        "data.val=wds:nowhere-{0..2}.tar": "nowhere-0.tar: no such file",
    }.items():
        assert ssam_scale("train", "--config", config, folder, override) == 2
        err = capsys.readouterr().err
        assert told in err
        assert err.count("\n") == 1 or "order" in override


@pytest.mark.slow
def test_a_run_of_a_file_goes_on_with_its_shards(data: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bit for bit, from within an epoch, on as many threads as are found to be needed."""
    config = write_config(home / "run.yaml", data, checkpoint={"every_steps": 1, "keep": 20}, train={"epochs": 2})
    for number in (1, 2):
        write_beton(data / "train", home / f"shard-{number}.beton", shard=Shard(number, 2), progress=False)
    assert ssam_scale("train", "--config", config, f"tracking.uri=sqlite:///{home}/other.db") == 0
    (home / "checkpoints").rename(home / "of_file")
    place = f"checkpoint.resume={home}/of_file/epoch_0001_step_000006"
    shards = f"{home}/shard-{{1..2}}.beton"
    assert ssam_scale("train", "--config", config, place, f"data.train={shards}", "data.workers=auto") == 0
    assert differing(home / "of_file/epoch_0002", home / "checkpoints/epoch_0002") == []
    found = re.search(r"data.workers auto: (\d+) loader threads?", capsys.readouterr().out)
    client = mlflow.MlflowClient(f"sqlite:///{home}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("ssam_scale").experiment_id])
    assert found is not None
    assert (run.data.params["data.workers"], run.data.tags["loader_workers"]) == ("auto", found[1])
    assert datasets(home)["training"] == ("shard-{1..2}.beton", open_images(Path(shards)).fingerprint)


def test_what_is_said_before_a_run_of_several_files(data: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(home / "run.yaml", data)
    assert ssam_scale("train", "--config", config, f"data.train={data}/*.beton", "--dry-run") == 0
    assert f"data.val {data}/val.beton holds images of data.train" in capsys.readouterr().out
    assert ssam_scale("doctor", "--config", config, f"data.train={data}/{{train,val}}.beton") == 0
    assert f"data.train: {data}/{{train,val}}.beton: 68 images" in capsys.readouterr().out.replace("\n", " ")
    for override, told in {
        f"data.train={data}/none-*.beton": "none-*.beton: no file fits this pattern",
        f"data.val={data}/{{val,none}}.beton": "none.beton: no such file",
        f"data.train={data}/{{train,train}}.beton": "have the same content",
    }.items():
        assert ssam_scale("train", "--config", config, override) == 2
        err = capsys.readouterr().err
        assert told in err
        assert err.count("\n") == 1


def test_a_folder_is_found_as_a_shell_would_find_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SCRATCH", str(tmp_path / "s"))
    config = write_config(tmp_path / "run.yaml", tmp_path)
    read = load(config, ["data.train=folder:~/a b", "data.val=folder:$SCRATCH/v"])
    assert read.data.train == Path(f"folder:{tmp_path}/a b")
    assert read.data.val == Path(f"folder:{tmp_path}/s/v")
    (tmp_path / "again.yaml").write_text(dump(read))
    assert load(tmp_path / "again.yaml").data == read.data

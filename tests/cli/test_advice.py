"""Likely mistakes on the command line, each answered by what to type instead."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import typer
from PIL import Image

from ssam_scale.cli.main import app, main
from ssam_scale.config.load import load
from ssam_scale.data.write import write_beton
from ssam_scale.errors import UserError
from tests.support.configs import SMALL

CASES = {
    "a section cut by the shell": (
        ["perturbation.mask={pattern:", "depth,", "cut:", "[0.5,", "0.5]}"],
        "override perturbation.mask={pattern:: the shell has cut it at a space; quote it: "
        "'perturbation.mask={pattern: depth, cut: [0.5, 0.5]}'",
    ),
    "a list cut by the shell": (
        ["data.mean=[0.5,", "0.5,", "0.5]"],
        "the shell has cut it at a space; quote it: 'data.mean=[0.5, 0.5, 0.5]'",
    ),
    "a key as an option": (
        ["--lr", "0.3"],
        "--lr: no such option; keys of the configuration are written without",
    ),
    "a key of several words": (["--batch-size=32"], "written without dashes: data.batch_size=32"),
    "a dotted key": (["--train.epochs", "3"], "written without dashes: train.epochs=3"),
    "a comment in an override": (
        ["tracking.run_name=run #3"],
        "# begins a comment in YAML; quote the value: 'tracking.run_name=\"run #3\"'",
    ),
    "a mask's name": (["perturbation.mask=row"], "given \"row\"; write 'perturbation.mask={pattern: row}'"),
    "a method's name": (["perturbation=sam"], "write 'perturbation={preset: sam}', and no perturbation null"),
    "a method's name in capitals": (["perturbation=MSAM"], "write 'perturbation={preset: msam}'"),
    "ZeRO without a stage": (["sharding.backend=zero"], 'given "zero"; zero0 to zero3 are DeepSpeed\'s ZeRO: zero1'),
    "DeepSpeed": (["sharding.backend=deepspeed"], "zero0 to zero3 are DeepSpeed's ZeRO: zero1 shards optimizer states"),
    "a tag": (
        ["model.name=resnet18.a1_in1k"],
        "name resnet18.a1_in1k: tag a1_in1k names weights of the hub; set model.pretrained=true to start from them, or "
        "name the network alone: resnet18",
    ),
    "a tag and a file": (
        ["model.name=resnet18.a1_in1k", "model.pretrained=w.pth"],
        "tag a1_in1k names weights of the hub, and model.pretrained is w.pth; set model.pretrained=true",
    ),
    "torchvision's name": (["model.name=torchvision.resnet18"], "named without where they come from: resnet18"),
    "a hub's address": (
        ["model.name=https://huggingface.co/timm/resnet18.a1_in1k"],
        "models are named without where they come from: resnet18.a1_in1k",
    ),
    "a scheduler's own word": (["schedule.kwargs={warmup_t: 3}"], "it is schedule.warmup_epochs"),
    "an optimizer's long word": (["optimizer.kwargs={learning_rate: 0.5}"], "it is optimizer.lr"),
    "a hub's tag": (["model.name=hf_hub:timm/resnet18.a1_in1k"], "without where they come from: resnet18.a1_in1k"),
    "an optimizer's name": (["optimizer=adamw"], 'given "adamw"; write optimizer.name=adamw'),
    "a model's name": (["model=resnet50"], 'given "resnet50"; write model.name=resnet50'),
    "a backend's name": (["sharding=zero2"], 'given "zero2"; write sharding.backend=zero2'),
    "an argument among those of the file": (["model.kwargs.in_chans=1"], "error: override model.kwargs.in_chans=1: "),
    "another's option": (["--learning_rate=0.1"], "are written without dashes: optimizer.lr=0.1"),
    "a short option": (["-lr", "0.1"], "-lr: no such option; keys of the configuration are written without dashes: "),
    "a near option": (["--epoch", "3"], "written without dashes: train.epochs=3"),
    "an option of nothing": (["--frobnicate"], "--frobnicate: no such option; keys of the configuration are written"),
    "a hub's name": (["model.name=timm/resnet18"], "models are named without where they come from: resnet18"),
    **{
        f"{section}.kwargs.{name}": ([f"{section}.kwargs.{name}=1"], f"{name} does not belong here: {where}")
        for section, name, where in [
            ("model", "num_classes", "it is model.num_classes"),
            ("model", "drop_path_rate", "it is model.drop_path_rate"),
            ("model", "in_chans", "images are RGB"),
            ("model", "pretrained", "weights are named by model.pretrained"),
            ("model", "checkpoint_path", "weights are named by model.pretrained"),
            ("model", "cache_dir", "weights are named by model.pretrained"),
            ("model", "pretrained_strict", "weights are named by model.pretrained"),
            ("optimizer", "lr", "it is optimizer.lr"),
            ("optimizer", "momentum", "it is optimizer.momentum"),
            ("optimizer", "weight_decay", "it is optimizer.weight_decay"),
            ("schedule", "min_lr", "it is schedule.min_lr"),
            ("schedule", "num_epochs", "it is train.epochs"),
        ]
    },
    "data.workers": (
        ["data.workers=100000"],
        "data.workers: must be a whole number from 1 to 1024, auto or null, given",
    ),
    "means of bytes": (
        ["data.mean=[124, 116, 104]"],
        "must be three numbers in [0, 1]; of pixels from 0 to 255, write",
    ),
    "deviations of bytes": (["data.std=[58, 57, 57]"], "data.std: must be three numbers in [0, 1]; of pixels"),
    "a negative mean": (["data.mean=[-1, 0, 0]"], "data.mean: must be three numbers in [0, 1], given [-1"),
    "an experiment without a name": (["tracking.experiment="], "tracking.experiment: must be text, given null"),
    "an experiment of nothing": (['tracking.experiment=""'], "tracking.experiment: is empty; give a name"),
    "a run of blanks": (['tracking.run_name="  "'], "tracking.run_name: is empty; give a name"),
    "a group of nothing": (['tracking.group=""'], "tracking.group: is empty; give a name"),
    "a long name": (["tracking.experiment=" + "x" * 251], "tracking.experiment: has 251 characters; at most 250"),
    **{
        key: ([f"{key}={value}"], f"{key}: must be less than or equal to")
        for key, value in {
            "train.epochs": 10**21,
            "train.seed": 2**64,
            "optimizer.lr": "1e30",
            "optimizer.weight_decay": "1e9",
            "data.batch_size": 10**12,
            "data.resolution": 10**6,
            "model.num_classes": 10**9,
        }.items()
    },
}


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_is_one_line_with_what_to_type(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, told = CASES[case]
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(SMALL)
    with pytest.raises(SystemExit) as ended:
        main(["train", "--config", "run.yaml", *arguments])
    out, err = capsys.readouterr()
    assert ended.value.code == 2
    assert out == ""
    assert told in err
    assert err.count("\n") == 1
    assert [entry.name for entry in Path().iterdir()] == ["run.yaml"]


def test_a_launcher_is_given_the_line_and_no_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What torchrun prints of a failed process; it was the 40 lines of a traceback, for each of them."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    (tmp_path / "run.yaml").write_text(SMALL)
    with pytest.raises(SystemExit) as ended:
        main(["train", "--config", str(tmp_path / "run.yaml"), "train.epoch=3"])
    assert ended.value.code == 2
    line = capsys.readouterr().err
    report = str(ChildFailedError("train.py", {0: ProcessFailure(0, 1, 2, str(file))}))
    assert line.strip() in report
    assert "File" not in report
    assert len(report.splitlines()) < 20


FILES = {
    "": "is empty; start from one of the files in configs/",
    "# nothing\n": "is empty; start from one of the files in configs/",
    "model:\n\tname: x\n": "run.yaml:2:1: not YAML: a tab; lines are indented with spaces",
    "a: &a {x: 1}\nb:\n  <<: *a\n": "run.yaml:3: << (merging an anchor's keys) is not supported",
}


@pytest.mark.parametrize("text", FILES)
def test_a_file_that_is_no_configuration(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        load(tmp_path / "run.yaml")
    assert FILES[text] in str(caught.value)


def test_what_is_not_there_or_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("q.yaml").write_text(SMALL)
    with pytest.raises(UserError, match=r"nosuch.yaml: no such file; the nearest in . is q.yaml"):
        load(Path("nosuch.yaml"))
    with pytest.raises(UserError, match="is a folder; give the YAML file of a run"):
        load(tmp_path)


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text(SMALL)
    keys = {
        "data.train": "~/t.beton",
        "data.val": "~/v.beton",
        "checkpoint.directory": "~/c",
        "checkpoint.resume": "~/r",
    }
    config = load(tmp_path / "run.yaml", [f"{key}={value}" for key, value in keys.items()])
    assert config.data.train == tmp_path / "t.beton"
    assert config.data.val == tmp_path / "v.beton"
    assert config.checkpoint.directory == tmp_path / "c"
    assert config.checkpoint.resume == str(tmp_path / "r")
    assert load(tmp_path / "run.yaml", ["data.train=~nobody-of-this-name/x"]).data.train == Path(
        "~nobody-of-this-name/x"
    )


def test_a_variable_of_the_environment_is_its_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a job's configuration: in a file no shell sees it, and a folder named `$SCRATCH` is nobody's wish."""
    monkeypatch.setenv("SCRATCH", str(tmp_path))
    monkeypatch.delenv("SCRATCHES", raising=False)
    (tmp_path / "run.yaml").write_text(SMALL)
    keys = {"data.train": "$SCRATCH/t.beton", "checkpoint.directory": "${SCRATCH}/c", "checkpoint.resume": "$SCRATCH/r"}
    config = load(tmp_path / "run.yaml", [f"{key}={value}" for key, value in keys.items()])
    assert config.data.train == tmp_path / "t.beton"
    assert config.checkpoint.directory == tmp_path / "c"
    assert config.checkpoint.resume == str(tmp_path / "r")
    for override, told in {
        "checkpoint.directory=$SCRATCHES/c": "checkpoint.directory: the environment variable SCRATCHES is not set",
        'checkpoint.directory=""': "checkpoint.directory: is empty; a path is needed",
        "data.train=s3://bucket/t.beton": "data.train: is an address; a path is needed",
        "perturbation.rho=1e9": "perturbation.rho: must be less than or equal to 1000",
    }.items():
        with pytest.raises(UserError, match=told):
            load(tmp_path / "run.yaml", [override])


@pytest.mark.parametrize(
    ("given", "meant"),
    {
        "sqlite:///~/m.db": "sqlite:///{home}/m.db",
        "sqlite+pysqlite:///~/m.db?timeout=9": "sqlite+pysqlite:///{home}/m.db?timeout=9",
        "file:~/zz": "file:{home}/zz",
        "file://~/zz": "file://{home}/zz",
        "file:///~/zz": "file://{home}/zz",
        "~/yy": "{home}/yy",
        "sqlite:///$SCRATCH/m.db": "sqlite:///{home}/s/m.db",
        "sqlite:///runs/${NUMBER}.db": "sqlite:///runs/7.db",
        "file:$SCRATCH/q": "file:{home}/s/q",
        "file:///$SCRATCH/q": "file://{home}/s/q",
        "sqlite:///a~b$.db": "sqlite:///a~b$.db",
        "http://~u:$SCRATCH@host:5000": "http://~u:$SCRATCH@host:5000",
        "postgresql://u:pa$word@host/db": "postgresql://u:pa$word@host/db",
    }.items(),
)
def test_home_and_variables_in_a_tracking_uri(
    given: str, meant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SCRATCH", f"{tmp_path}/s")
    monkeypatch.setenv("NUMBER", "7")
    (tmp_path / "run.yaml").write_text(SMALL)
    assert load(tmp_path / "run.yaml", [f'tracking.uri="{given}"']).tracking.uri == meant.format(home=tmp_path)
    monkeypatch.delenv("SCRATCH")
    if "$SCRATCH" in given and "@" not in given:
        with pytest.raises(UserError, match=r"tracking\.uri: the environment variable SCRATCH is not set"):
            load(tmp_path / "run.yaml", [f'tracking.uri="{given}"'])


def _paths_of(commands: typer.Typer) -> Iterator[tuple[str, Any]]:
    """Every option and argument that is a path or a tracking URI, and what typer was told of it."""
    for group in commands.registered_groups:
        yield from _paths_of(group.typer_instance)
    for command in commands.registered_commands:
        for name, hint in get_type_hints(command.callback, include_extras=True).items():
            if "Path" in str(get_args(hint)[:1]) or "uri" in name:
                yield f"{command.name} {name}", get_args(hint)[1]


def test_every_path_of_every_command_knows_home() -> None:
    found = dict(_paths_of(app))
    assert len(found) >= 15
    assert [name for name, told in found.items() if told.callback is None] == []


def test_home_and_variables_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No shell looks into quotes, or behind `--out=`."""
    there = tmp_path / "there"
    there.mkdir()
    monkeypatch.chdir(there)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HERE", str(tmp_path))
    monkeypatch.delenv("NOWHERE", raising=False)
    (tmp_path / "run.yaml").write_text(SMALL)
    (tmp_path / "zero.json").write_text('{"zero_optimization": {"stage": 2}}')
    (tmp_path / "images/a").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "images/a/x.png")

    def code(*arguments: str) -> int:
        with pytest.raises(SystemExit) as ended:
            main(list(arguments))
        return int(ended.value.code or 0)

    assert code("train", "--config=~/run.yaml", "--deepspeed-config=$HERE/zero.json", "--print-config") == 0
    assert code("data", "write", "~/images", "${HERE}/o.beton") == 0
    assert (tmp_path / "o.beton").is_file()
    assert code("data", "check", "~/o.beton") == 0
    capsys.readouterr()
    for arguments, told in {
        ("data", "write", "~/images", "$NOWHERE/o"): "OUT $NOWHERE/o: the environment variable NOWHERE is not set",
        ("train", "-c", "$NOWHERE/r.yaml"): "--config $NOWHERE/r.yaml: the environment variable NOWHERE is not set",
        ("compare", "--tracking-uri=file:~/none"): f"there is no folder {tmp_path}/none",
        ("compare", "--html=~/no/x", "--tracking-uri=file:~"): f"there is no folder {tmp_path}/no;",
        ("send", "~/unsent_1"): f"{tmp_path}/unsent_1: nothing waits there",
    }.items():
        assert code(*arguments) == 2
        err = capsys.readouterr().err
        assert told in err, err
        assert err.count("\n") == 1
    assert list(there.iterdir()) == []
    (there / "$x.beton").write_text("")
    assert code("data", "check", "$x.beton") == 2
    assert "$x.beton" in capsys.readouterr().err


def test_a_hash_within_a_word_or_in_quotes_is_no_comment(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(SMALL)
    for given, name in {"a#b": "a#b", '"run #3"': "run #3", "'#'": "#"}.items():
        assert load(tmp_path / "run.yaml", [f"tracking.run_name={given}"]).tracking.run_name == name


def test_pixels_of_unknown_range_and_names_that_are_no_text_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "images" / "a"
    folder.mkdir(parents=True)
    for mode, pixels in {"F": np.float32, "I": np.int32}.items():
        Image.fromarray(np.ones((8, 8), pixels)).save(folder / "x.tiff")
        with pytest.raises(UserError, match=f"pixels of mode {mode}.*, whose range is not known; convert it to 8 bits"):
            write_beton(tmp_path / "images", tmp_path / "x.beton", progress=False)
    Image.fromarray(np.ones((8, 8), np.uint8)).save(folder / "x.tiff")
    folder.rename(os.fsdecode(os.fsencode(tmp_path / "images") + b"/\xff"))
    with pytest.raises(UserError, match=r"the class folder .* has a name that is not UTF-8; rename it"):
        write_beton(tmp_path / "images", tmp_path / "x.beton", progress=False)
    assert [entry.name for entry in tmp_path.iterdir()] == ["images"]


@pytest.mark.parametrize(
    "command",
    ["", "train", "compare", "send", "list", "cost", "data", "data write", "data check", "bench", "compare --watch"],
)
def test_a_command_alone_says_what_it_needs(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`ssam-scale compare` was a traceback."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(command.split())
    out, err = capsys.readouterr()
    assert ended.value.code in (0, 2)
    if command.startswith("compare"):
        assert "there is no database mlflow.db; train first, or name another store" in err
    else:
        assert "Usage" in out + err or "error: " in err

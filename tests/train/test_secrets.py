"""Passwords and tokens: whole commands, and a sweep over everything that they wrote, said and showed of themselves.

What is looked for is one word, which all secrets begin with: a new file, tag or process that shows one is found without
being named here.
"""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.gateway import Gateway
from tests.support.mlflow_server import MLflowServer
from tests.support.processes import daemon, run, wait_until
from tests.support.runs import write_config
from tests.support.stores import put_store

pytestmark = pytest.mark.slow

WORD = "hush"
SECRETS = {
    "MLFLOW_TRACKING_TOKEN": "hush-token",
    "AWS_SECRET_ACCESS_KEY": "hush-aws",
    "WANDB_API_KEY": "hush-wandb",
    "HF_TOKEN": "hush-hf",
    "PGPASSWORD": "hush-pg",
}
PATIENCE_S = 600


class Watch:
    """Within the `with`, looks at the arguments of all processes, again and again.

    Attributes:
        shown: arguments with a secret in them.
    """

    def __init__(self) -> None:
        self.shown: set[str] = set()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._end.wait(0.02):
            for entry in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    arguments = entry.read_bytes()
                except OSError:  # it has ended meanwhile
                    continue
                if WORD.encode() in arguments:
                    self.shown.add(arguments.replace(b"\0", b" ").decode(errors="replace"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MLflowServer]:
    folder = tmp_path_factory.mktemp("server")
    put_store(folder / "mlflow.db")
    with MLflowServer(f"sqlite:///{folder}/mlflow.db", folder / "log", folder / "artifacts") as running:
        running.folder = folder  # type: ignore[attr-defined]
        yield running


def with_password(address: str) -> str:
    return address.replace("//", "//me:hush-password@")


def command(home: Path, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`ssam-scale` in a process of its own, whose environment is full of secrets."""
    words = [sys.executable, "-m", "ssam_scale", *arguments]
    return run(words, cwd=home, env=SECRETS | environment, timeout=PATIENCE_S)


def with_secrets(*folders: Path, given: frozenset[str]) -> list[Path]:
    """Files that hold a secret, but those that a person has written.

    Args:
        folders: that are searched.
        given: names of files that may.
    """
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file() and path.name not in given]
    assert files
    return [path for path in files if WORD.encode() in path.read_bytes()]


GIVEN = frozenset({"run.yaml", "unreachable.yaml", "data.yaml"})


def test_the_sweep_finds_what_it_looks_for(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "binary").write_bytes(b"\0hush-password\0")
    (tmp_path / "other").write_bytes(b"\0")
    assert with_secrets(tmp_path, given=frozenset()) == [tmp_path / "folder" / "binary"]
    with (
        Watch() as watch,
        daemon([sys.executable, "-c", "import time; time.sleep(600)", "hush-token"], tmp_path / "log"),
    ):
        wait_until(lambda: bool(watch.shown), PATIENCE_S, "its arguments")


@pytest.mark.exhaustive
def test_no_secret_is_written_said_or_shown(server: MLflowServer, data: Path, tmp_path: Path) -> None:
    """A run that ends well, one that fails, one whose store goes away, resumed and sent; and all that looks at them.

    It takes a minute and more, as each of a dozen commands is a process that imports everything.
    """
    said: dict[str, str] = {}
    codes: dict[str, int] = {}

    def do(name: str, *arguments: str | Path, **environment: str) -> None:
        done = command(tmp_path, *arguments, **environment)
        said[name], codes[name] = done.stdout, done.returncode

    with Gateway(server.address) as gateway, Watch() as watch:
        store: dict[str, Any] = {"uri": with_password(gateway.address), "log_model": True}
        config = write_config(tmp_path / "run.yaml", data, tracking=store, train={"epochs": 1})
        do("print", "train", "--config", config, "--print-config")
        do("doctor", "doctor", "--config", config)
        do("dry run", "train", "--config", config, "--dry-run")
        do("train", "train", "--config", config)
        do("again", "train", "--config", config, "--resume", "auto")
        do("failure", "train", "--config", config, "--resume", "auto", "train.epochs=2", "data.std=[1e-42,1e-42,1e-42]")
        gateway.until, gateway.fault = "logged-models", "reset"  # which is asked for when training is over
        do("away", "train", "--config", config, "--resume", "auto", "train.epochs=3")
        left = list((tmp_path / "checkpoints").glob("unsent_*"))
        do("sends not", "send", *left, MLFLOW_TRACKING_URI=with_password(gateway.address))
        waiting = [path for folder in left for path in folder.rglob("*") if path.is_file()]
        modes = {path.name: path.stat().st_mode & 0o777 for path in waiting}
        hidden = with_secrets(tmp_path, given=GIVEN)
        gateway.fault = None
        wait_until(lambda: not any(folder.exists() for folder in left), PATIENCE_S, "all of it sent")
        # What a person types, everybody on the machine may read; what it says must not be more.
        typed = server.address.replace("//", "//me:typed-password@")
        do("compare", "compare", "--tracking-uri", typed, "--html", "page.html")
        unreachable = write_config(
            tmp_path / "unreachable.yaml", data, tracking={"uri": "http://127.0.0.1:9/?token=hush-query"}
        )
        for name in ("doctor", "train"):
            do(f"{name} without a store", name, "--config", unreachable)
        elsewhere = tmp_path / "data.yaml"
        images = "https://me:hush-data@127.0.0.1/train.beton?X-Amz-Signature=hush-signature"
        elsewhere.write_text(config.read_text().replace(str(data / "train.beton"), images))
        for name in ("doctor", "train"):
            do(f"{name} without data", name, "--config", elsewhere)
    assert {name: code for name, code in codes.items() if code} == {
        "failure": 2,
        "sends not": 2,
        "doctor without a store": 1,
        "train without a store": 2,
        "doctor without data": 2,
        "train without data": 2,
    }, "\n".join(f"{name}: {text[-800:]}" for name, text in said.items())
    assert "did not reach the tracking store" in said["away"]
    assert "me:***@" in said["print"]
    assert [name for name, text in said.items() if WORD in text] == []
    assert "typed-password" not in said["compare"] + (tmp_path / "page.html").read_text()
    assert watch.shown == set()
    assert hidden == []
    assert modes["records.jsonl"] == 0o600
    folder: Path = server.folder  # type: ignore[attr-defined]
    with sqlite3.connect(folder / "mlflow.db") as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    assert with_secrets(tmp_path, folder, given=GIVEN) == []

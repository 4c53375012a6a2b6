"""No password or token reaches tags, parameters, messages or the list of processes."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssam_scale.errors import UserError
from ssam_scale.tracking import watchdog
from ssam_scale.tracking.environment import environment_tags
from ssam_scale.tracking.redaction import all_without_secrets, without_secrets
from ssam_scale.tracking.store import check_store

CASES = {
    "http://me:secret@host:5000/x": "http://me:***@host:5000/x",
    "https://me:s@cret@host/x": "https://me:***@host/x",
    "https://secret@host/x": "https://***@host/x",
    "https://secret:@host/x": "https://***:@host/x",
    "https://secret:x-oauth-basic@github.com/a/b.git": "https://***:x-oauth-basic@github.com/a/b.git",
    "https://host/x#access_token=secret&y=2": "https://host/x#access_token=***&y=2",
    "MYSQL_PWD=secret SSHPASS=secret OLDPWD=/there x": "MYSQL_PWD=*** SSHPASS=*** OLDPWD=/there x",
    "SSH_PRIVATE_KEY=secret access_token=secret": "SSH_PRIVATE_KEY=*** access_token=***",
    "{'token': 'secret', 'class_token': 'cls'}": "{'token': ***, 'class_token': 'cls'}",
    "Authorization: token secret": "Authorization: token ***",
    "postgresql://me@host/db": "postgresql://me@host/db",
    "postgresql+psycopg2://me:secret@host:1/db?sslmode=require": "postgresql+psycopg2://me:***@host:1/db?sslmode=require",
    "mysql://host/db?user=me&password=secret&x=1": "mysql://host/db?user=me&password=***&x=1",
    "https://host/x?api_key=secret": "https://host/x?api_key=***",
    "https://host/x?X-Amz-Signature=secret&y=2": "https://host/x?X-Amz-Signature=***&y=2",
    "postgresql://me:se/cret@host/db": "postgresql://me:***@host/db",
    "postgresql://me:s@/cret@host:5432/db": "postgresql://me:***@host:5432/db",
    "postgresql://me:secret@/db?host=/tmp": "postgresql://me:***@/db?host=/tmp",
    "mysql+pymysql://host/db?user=me&password=secret": "mysql+pymysql://host/db?user=me&password=***",
    "mssql+pyodbc:///?odbc_connect=UID%3Dme%3BPWD%3Dsecret": "mssql+pyodbc:///?odbc_connect=UID%3Dme%3BPWD%3D***",
    "mssql+pyodbc:///?odbc_connect=PWD%3Dsecret%3BUID%3Dme": "mssql+pyodbc:///?odbc_connect=PWD%3D***%3BUID%3Dme",
    "s3://AKIA:secret@bucket/x": "s3://AKIA:***@bucket/x",
    "https://x-access-token:secret@github.com/a/b.git": "https://x-access-token:***@github.com/a/b.git",
    "git@github.com:a/b.git": "git@github.com:a/b.git",
    "host=h user=me password=secret dbname=x": "host=h user=me password=*** dbname=x",
    "MLFLOW_TRACKING_TOKEN=secret ssam-scale train": "MLFLOW_TRACKING_TOKEN=*** ssam-scale train",
    "env MLFLOW_TRACKING_PASSWORD='my secret' x": "env MLFLOW_TRACKING_PASSWORD=*** x",
    "AWS_ACCESS_KEY_ID=AKIA AWS_SECRET_ACCESS_KEY=secret": "AWS_ACCESS_KEY_ID=AKIA AWS_SECRET_ACCESS_KEY=***",
    "{'Authorization': 'Bearer secret'}": "{'Authorization': 'Bearer ***'}",
    "{'password': 'my secret', 'user': 'me'}": "{'password': ***, 'user': 'me'}",
    'api_key: secret, "db_password": "secret"': 'api_key: ***, "db_password": ***',
    "X-Api-Key: secret": "X-Api-Key: ***",
    "Set-Cookie: session=secret; Path=/": "Set-Cookie: ***; Path=/",
    "https://host/x?Authorization=secret": "https://host/x?Authorization=***",
    "FATAL: password authentication failed": "FATAL: password authentication failed",
    "Authorization: Basic secret": "Authorization: Basic ***",
    "model.kwargs.class_token=true": "model.kwargs.class_token=true",
    "sqlite:///mlflow.db": "sqlite:///mlflow.db",
    "http://host:5000/a@b": "http://host:5000/a@b",
    "mail me@host": "mail me@host",
    "cannot reach 'http://a:secret@h' (see http://b:secret@k)": "cannot reach 'http://a:***@h' (see http://b:***@k)",
}


@pytest.mark.parametrize("text", CASES)
def test_what_is_secret_is_starred_and_nothing_else(text: str) -> None:
    assert without_secrets(text) == CASES[text]
    assert without_secrets(CASES[text]) == CASES[text]


@given(st.text(min_size=8), st.sampled_from(["http", "https", "postgresql", "mysql+pymysql"]))
def test_no_password_passes_however_it_is_spelt(password: str, scheme: str) -> None:
    written = quote(f"pw{password}", safe="")
    text = f"train --config a.yaml tracking.uri={scheme}://me:{written}@host/db train.epochs=3"
    assert without_secrets(text) == f"train --config a.yaml tracking.uri={scheme}://me:***@host/db train.epochs=3"
    assert written not in without_secrets(shlex.join(shlex.split(text)))


def test_keys_of_a_configuration_say_what_is_secret() -> None:
    given = {"comet": {"api_key": "secret", "project": "p"}, "token": "secret", "class_token": "cls", "keys": ["a"]}
    assert all_without_secrets(given) == {**given, "comet": {"api_key": "***", "project": "p"}, "token": "***"}


def test_the_command_is_tagged_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["ssam-scale", "train", "tracking.uri=http://me:secret@host:5000"])
    assert environment_tags()["command"] == "ssam-scale train tracking.uri=http://me:***@host:5000"


def test_a_configuration_that_was_printed_lacks_its_password() -> None:
    with pytest.raises(UserError, match="stands for a password that was left out; write it there"):
        check_store("http://me:***@127.0.0.1:5000")


def test_the_watcher_has_none_among_its_arguments() -> None:
    watcher = watchdog.start("postgresql://me:secret@127.0.0.1/db", "run", "host:1", Path("unsent"))
    try:
        shown = Path(f"/proc/{watcher.pid}/cmdline")
        while not (text := shown.read_bytes()):  # not there yet
            time.sleep(0.01)
        arguments = text.split(b"\0")
        assert b"run" in arguments
        assert not any(b"secret" in argument for argument in arguments)
    finally:
        watchdog.stop(watcher)

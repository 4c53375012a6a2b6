"""Opening an MLflow tracking store: quickly, quietly, and with an error that says what would work."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import shlex
import socket
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, unquote, urlsplit

from ssam_scale.config.knobs import flat
from ssam_scale.config.schema import Config
from ssam_scale.errors import UserError
from ssam_scale.tracking import view
from ssam_scale.tracking.commands import HOSTED, is_folder, mlflow_command, server_line
from ssam_scale.tracking.moved import BESIDE, follow_moved
from ssam_scale.tracking.redaction import all_without_secrets, without_secrets

_log = logging.getLogger(__name__)

_T = TypeVar("_T")

# The limit of MLflow's stores.
_CHARACTERS = 6000


def flatten(config: Config) -> dict[str, str]:
    """Parameters of a run: dotted key to value; lists as JSON, absence as `null`."""
    values = flat(plain_values(config))
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}
    return {key: shortened(text, _CHARACTERS) for key, text in texts.items()}


def plain_values(config: Config) -> dict[str, Any]:
    """The configuration in plain values, without passwords."""
    values: dict[str, Any] = all_without_secrets(config.model_dump(mode="json"))
    return values


def shortened(text: str, length: int) -> str:
    """`text` in at most `length` characters."""
    return text if len(text) <= length else text[: length - 1] + "…"


_WORKS = "sqlite:///mlflow.db, http://HOST:PORT of an `mlflow server`, or file:FOLDER"
_DATABASES = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
ANSWER_WITHIN_S = 5
_ALONE_WITHIN_S = 120

# A request's own timeout is for each piece of the answer, which may come byte by byte for ever.
_REQUEST_WITHIN_S, _FILES_WITHIN_S = 30.0, 600.0
_OF_FILES = {"log_artifact", "log_artifacts", "log_model_artifacts", "download_artifacts"}


def within(seconds: float, ask: Callable[[], _T]) -> _T:
    """The result of asking a store, which is given up after so many seconds, whatever it does.

    Raises:
        TimeoutError: there was none by then. The thread that asks is left to itself, and holds up no process that ends.
        Exception: whatever `ask` raises.
    """
    results: list[_T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(ask())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="asking the tracking store", daemon=True)
    thread.start()
    thread.join(max(seconds, 0.0))
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError("timed out")
    return results[0]


class _Bounded:
    """An `MlflowClient` of which no method takes longer than _REQUEST_WITHIN_S, or _FILES_WITHIN_S with files."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._client, name)
        if not callable(found):
            return found
        seconds = _FILES_WITHIN_S if name in _OF_FILES else _REQUEST_WITHIN_S
        return lambda *args, **kwargs: within(seconds, lambda: found(*args, **kwargs))


def open_store(uri: str, *, create: bool) -> Any:
    """An `mlflow.MlflowClient` on a store that has answered; one on a server never waits for minutes.

    Args:
        uri: MLflow tracking URI.
        create: make the local database or folder where there is none; otherwise that is an error.

    Raises:
        UserError: the URI means nothing to MLflow, or its store does not answer within seconds.
    """
    _probe(uri, create=create)
    if not create and (path := sqlite_path(uri)) is not None and _is_anothers(path):
        raise UserError(f"tracking.uri {uri}: {path} is a database of something else than MLflow; name another store")
    _quiet_mlflow(uri)
    database = sqlite_path(uri) if create else None
    with refusals(uri), nullcontext() if database is None else _alone(database.parent):
        from mlflow import MlflowClient

        # MLflow's own retries would keep a wrong address waiting for minutes.
        with environment(MLFLOW_HTTP_REQUEST_MAX_RETRIES="0", MLFLOW_HTTP_REQUEST_TIMEOUT=str(ANSWER_WITHIN_S)):
            client = MlflowClient(tracking_uri=uri)
            if sqlite_path(uri) is not None or is_folder(uri):  # where no network is waited for
                client.search_experiments(max_results=1)
                return client
            within(2.0 * ANSWER_WITHIN_S, lambda: client.search_experiments(max_results=1))
    return _Bounded(client)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Within the `with`, no other process is within it for this folder: MLflow's tables are not made by two at once.

    Of jobs that begin together with a new database, each would find tables half made, and all would fail.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        # Not for ever: a job may be stopped. Some network disks have no locks.
        give_up = time.monotonic() + _ALONE_WITHIN_S
        with suppress(OSError):
            while True:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > give_up:
                        break
                    time.sleep(0.05)
        yield
    finally:
        os.close(handle)


@contextmanager
def refusals(uri: str) -> Iterator[None]:
    """Within the `with`, what a store or its driver raises becomes a UserError that says what would work.

    Raises:
        UserError: the store refuses, or does not answer.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # MLflow lets its drivers' errors through, of every kind
        # In the words of a driver, which a traceback would show, there may be the password.
        raise UserError(refused(uri, str(error))) from (None if without_secrets(uri) != uri else error)


def store_folders(uri: str, experiment: str) -> list[Path]:
    """Folders of this machine that a store is written to: of a database in a file and of its artifacts, or of files."""
    with suppress(UserError):
        _check_address(uri)
        return _folders_of(uri, experiment)
    return []


def _folders_of(uri: str, experiment: str) -> list[Path]:
    database = sqlite_path(uri)
    if database is not None:
        artifacts = _artifact_location(uri, experiment)
        return [database.parent, *([Path(artifacts)] if artifacts is not None else [])]
    return [_folder(uri)] if is_folder(uri) else []


def check_store(uri: str) -> None:
    """Look at a store before there is something to record, and make nothing there; its folders apart.

    Raises:
        UserError: it cannot be recorded in.
    """
    _check_address(uri)
    parts = urlsplit(uri)
    path = sqlite_path(uri) if parts.scheme == "sqlite" else None
    if path is not None and (disk := network_disk(path)) is not None:
        _log.warning(
            "tracking.uri %s is on a network disk (%s), on which SQLite's locks do not hold: runs at the same time may "
            "damage it. Let a server write to a disk of its own machine: `%s`, tracking.uri=http://127.0.0.1:5000; or "
            "docker/compose.yaml",
            without_secrets(uri),
            disk,
            server_line("sqlite:////LOCAL/mlflow.db"),
        )
    if path is None or str(path) == ":memory:":
        _probe(uri, create=True)
        if parts.scheme in ("http", "https"):
            _connect(uri, (parts.hostname or "localhost", parts.port or {"http": 80, "https": 443}[parts.scheme]))
        return
    if path.is_file():
        _probe(uri, create=False)
    elif path.is_dir():
        raise UserError(refused(uri, f"{path} is a folder"))


# By the words of /proc/self/mountinfo. Of those that are no disk of their own machine.
_NETWORK_DISKS = {"nfs", "cifs", "smb3", "lustre", "gpfs", "beegfs", "ceph", "afs", "9p", "panfs", "wekafs", "pvfs2"}
_NETWORK_DISKS |= {f"fuse.{name}" for name in ("sshfs", "s3fs", "glusterfs", "ceph", "rclone", "gcsfuse", "juicefs")}


def network_disk(path: Path, mounts: str | None = None) -> str | None:
    """The type of the network file system that a file is on, or will be; None if it is on none.

    Args:
        path: of the file.
        mounts: the text of /proc/self/mountinfo; None: of this process's.
    """
    if mounts is None:
        try:
            mounts = Path("/proc/self/mountinfo").read_text()
        except OSError:
            return None
    place, found, depth = path.resolve(), None, -1
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.partition(" ")[0]
        if len(fields) < 5:
            continue
        point = Path(re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), fields[4]))
        # Of two at one place the later one hides the other.
        if len(point.parts) >= depth and place.is_relative_to(point):
            found, depth = kind, len(point.parts)
    return found if found is not None and found.rstrip("4") in _NETWORK_DISKS else None


def check_experiment(uri: str, name: str) -> None:
    """Look whether an experiment can be recorded in, where there is a store already.

    Raises:
        UserError: it was deleted, or the store cannot be read.
    """
    path = sqlite_path(uri) or (_folder(uri) if is_folder(uri) else None)
    if path is None or (path.exists() and not _is_anothers(path)):
        client = open_store(uri, create=False)
        with refusals(uri):
            _refuse_deleted(client.get_experiment_by_name(name), uri, name)


def _is_anothers(database: Path) -> bool:
    """Whether an SQLite file has no tables of MLflow's, which would make them as soon as it opens it."""
    if not database.is_file():
        return False
    try:
        with closing(sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True)) as connection:
            return not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'experiments'").fetchall()
    except sqlite3.Error:  # which opening it says
        return False


def _refuse_deleted(found: Any, uri: str, name: str) -> None:
    if found is not None and found.lifecycle_stage == "deleted":
        command = mlflow_command(uri, "experiments", "restore", "--experiment-id", str(found.experiment_id))
        hidden = " (with the password for ***)" if without_secrets(uri) != uri else ""
        raise UserError(
            f"tracking.experiment {name!r} was deleted; choose another name, or bring it back with `{command}`{hidden}"
        )


def experiment_id(client: Any, uri: str, name: str) -> str:
    """Id of the experiment `name`, made if there is none.

    Raises:
        UserError: the experiment was deleted, or the store refuses to make one.
    """
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, _artifact_location(uri, name), tags=_EXPERIMENT_TAGS))
        except Exception as error:
            # Another run of the same sweep may have been quicker.
            found = client.get_experiment_by_name(name)
            if found is None:
                raise UserError(f"tracking.experiment {name!r}: {one_line(error)}") from error
    _refuse_deleted(found, uri, name)
    follow_moved(found, uri, sqlite_path(uri))
    for key, value in _EXPERIMENT_TAGS.items():
        if key not in found.tags:  # made by hand, or by another version
            client.set_experiment_tag(found.experiment_id, key, value)
    return str(found.experiment_id)


def text_artifact(client: Any, run_id: str, path: str) -> str | None:
    """The text of a run's artifact; None if there is none, or the artifacts cannot be read now."""
    try:
        if not any(found.path == path for found in client.list_artifacts(run_id, str(Path(path).parent))):
            return None
        with tempfile.TemporaryDirectory() as folder:
            return Path(client.download_artifacts(run_id, path, folder)).read_text()
    except Exception:  # MLflow lets its stores' errors through, of every kind
        return None


# Without its kind the interface opens an experiment on an empty page about traces of language models.
_EXPERIMENT_TAGS = {
    "mlflow.experimentKind": "custom_model_development",
    "mlflow.note.content": (
        "Training runs of ssam_scale. `saving/…`: time saved over dense SAM, measured inside each run by probes, with "
        "a 95% interval; `overhead/…`: time on top of the base optimizer's; `summary/…`: of the whole run. "
        "`ssam-scale compare` compares them."
    ),
    **view.TAGS,
}


def one_line(error: object) -> str:
    """First line of an error's message, of bearable length."""
    lines = without_secrets(str(error)).strip().splitlines()
    # SQLAlchemy puts this before what happened.
    telling = [line for line in lines if not line.startswith("(raised as a result of Query-invoked autoflush")] or lines
    if not telling:
        return type(error).__name__
    if telling[0].startswith("API request to ") and (cause := _UNANSWERED.search(telling[0])):
        return f"the server does not answer ({cause[0]})"
    return telling[0][:500]


_UNANSWERED = re.compile(r"Connection refused|[Tt]imed out|Name or service not known|Connection reset by peer")


def is_permanent(error: Exception) -> bool:
    """Whether repeating a request is useless: it is refused for what it is, rather than the store being away.

    A login that is refused may be renewed.
    """
    status = getattr(error, "get_http_status_code", lambda: 503)()
    return 400 <= status < 500 and status not in (401, 403, 408, 429)


def absolute(uri: str) -> str:
    """A URI that means the same store in every working folder."""
    path = sqlite_path(uri)
    if path is not None:
        return uri.replace(f":///{path}", f":///{path.resolve()}", 1) if not path.is_absolute() else uri
    if is_folder(uri):
        return f"file://{quote(str(_folder(uri).resolve()))}"
    return uri


def sqlite_path(uri: str) -> Path | None:
    """File of an SQLite store; None for another store."""
    match = re.match(r"sqlite(?:\+\w+)?:///([^?]+)", uri)
    return Path(unquote(match[1])) if match else None


def _artifact_location(uri: str, experiment: str) -> str | None:
    database = sqlite_path(uri)
    if database is None:
        return None  # servers and folders know where their artifacts belong
    # MLflow's default is relative to where each process happens to run; beside the database the two stay together.
    return str(database.resolve().parent / BESIDE / re.sub(r"[^\w.-]+", "_", experiment))


def _quiet_mlflow(uri: str) -> None:
    """Before MLflow is imported: no usage telemetry, no chatter on a terminal that shows a progress bar."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ["DO_NOT_TRACK"] = "true"
    defaults = {
        "MLFLOW_LOGGING_LEVEL": "ERROR",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        # What training sends is repeated by our own writer, which does not block; these bound opening and closing.
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    }
    if is_folder(uri):
        defaults["MLFLOW_ALLOW_FILE_STORE"] = "true"
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    # It prints the traceback of every error that it raises as well; we say it in one line.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    # A line for each time that it tries again.
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)


def _probe(uri: str, *, create: bool) -> None:
    """Find out in a moment what MLflow would find out after minutes of retries."""
    _check_address(uri)
    scheme = urlsplit(uri).scheme.partition("+")[0]
    if not uri.strip() or scheme not in {"", "file", "http", "https", "sqlite", *_DATABASES, *HOSTED}:
        raise UserError(f"tracking.uri {without_secrets(uri)!r} is no MLflow tracking URI; use {_WORKS}")
    if scheme == "sqlite":
        _probe_sqlite(uri, create=create)
    elif is_folder(uri):
        parts, folder = urlsplit(uri), _folder(uri)
        if parts.netloc not in ("", "localhost"):
            whole = f"file:{parts.netloc}{parts.path}, or file://{parts.path} of the root"
            raise UserError(
                f"tracking.uri {uri} is of another machine, {parts.netloc}; a folder of this one is {whole}"
            )
        if not parts.path:
            raise UserError(f"tracking.uri {uri} names no folder; use {_WORKS}")
        if not create and not folder.is_dir():
            shown = without_secrets(uri)
            raise UserError(f"tracking.uri {shown}: there is no folder {folder}; train first, or name another store")
    elif scheme in _DATABASES:
        parts = urlsplit(uri)
        _connect(uri, (parts.hostname or "localhost", parts.port or _DATABASES[scheme]))


def _check_address(uri: str) -> None:
    """Refuse what is no address of a server, and would be a folder's or a traceback."""
    try:
        _ = urlsplit(uri).port
    except ValueError as error:
        raise UserError(f"tracking.uri {uri.rpartition('@')[2]}: {error}; use {_WORKS}") from None
    if ":***@" in uri:  # as `--print-config` shows it
        raise UserError(
            f"tracking.uri {uri}: *** stands for a password that was left out; write it there, or give user and "
            "password by MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )
    if re.fullmatch(r"[\w.-]+:\d+/?", uri):
        raise UserError(f"tracking.uri {uri} has no scheme; of a server, write http://{uri}")


def _folder(uri: str) -> Path:
    """The folder of a store that is one."""
    return Path(unquote(urlsplit(uri).path))


def _connect(uri: str, address: tuple[str, int]) -> None:
    try:
        socket.create_connection(address, timeout=ANSWER_WITHIN_S).close()
    except OSError as error:
        raise UserError(refused(uri, f"{address[0]} port {address[1]}: {error}")) from error


def _probe_sqlite(uri: str, *, create: bool) -> None:
    path = sqlite_path(uri)
    if path is None or str(path) == ":memory:":
        raise UserError(f"tracking.uri {uri} keeps nothing; use sqlite:///mlflow.db (or sqlite:////absolute/path.db)")
    if not create and not path.is_file():
        raise UserError(f"tracking.uri {uri}: there is no database {path}; train first, or name another store")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(path, timeout=ANSWER_WITHIN_S)
        try:
            # Of a file that is shorter than its first page SQLite thinks that it is new, and overwrites it.
            if path.is_file() and 0 < path.stat().st_size < 100:
                raise sqlite3.DatabaseError("file is not a database")
            # Taking the write lock finds a read-only file, a full disk and a file that is no database.
            connection.execute("BEGIN IMMEDIATE" if create else "SELECT name FROM sqlite_master LIMIT 1")
            connection.rollback()
        finally:
            connection.close()
    except (OSError, sqlite3.Error) as error:
        if isinstance(error, sqlite3.OperationalError) and "locked" in str(error):
            return  # another run is writing; MLflow waits for it
        raise UserError(refused(uri, f"{path}: {error}")) from error


def refused(uri: str, reason: str) -> str:
    """The line that says why a store cannot be used, and what works."""
    shown, scheme = without_secrets(uri), urlsplit(uri).scheme
    if "out-of-date database schema" in reason:
        return f"tracking.uri {shown} was written by another MLflow version; run `mlflow db upgrade {shown}` on a copy"
    if scheme in ("http", "https"):
        cause = _UNANSWERED.search(reason) or re.search(r"error code \d+", reason)
        why = cause[0] if cause else one_line(reason)
        return f"tracking.uri {shown}: no MLflow server answers ({why}); start one, or use sqlite:///mlflow.db"
    if "database is locked" in reason:
        return (
            f"tracking.uri {shown}: the database is locked: another program has been writing to it all the while, or a "
            f"stopped one has left it so (`fuser -v {shlex.quote(str(sqlite_path(uri)))}` names it); end that, or give "
            "this run a store of its own, tracking.uri=sqlite:///OTHER.db; many runs at once want an `mlflow server`, "
            "http://HOST:PORT"
        )
    return f"tracking.uri {shown}: {one_line(reason)}; what works: {_works_beside(scheme)}"


def _works_beside(scheme: str) -> str:
    """What works where a URI of this scheme does not."""
    return _WORKS.replace("sqlite:///mlflow.db", "sqlite:///OTHER/mlflow.db") if "sqlite" in scheme else _WORKS


@contextmanager
def environment(**values: str | None) -> Iterator[None]:
    """Within the `with`, these variables of the process's environment have these values; None: they are not set."""
    before = {name: os.environ.get(name) for name in values}
    try:
        _set_environment(values)
        yield
    finally:
        _set_environment(before)


def _set_environment(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value

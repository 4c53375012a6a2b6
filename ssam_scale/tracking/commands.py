"""What to type, and which address to open, to see runs in MLflow's own interface or to mend a store."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path
from urllib.parse import urlsplit

from ssam_scale.tracking import view
from ssam_scale.tracking.redaction import without_secrets


def mlflow_command(uri: str, *arguments: str) -> str:
    """A line for a shell that runs MLflow's command line on a store; a password in the URI is shown as ***.

    Args:
        uri: of the store.
        arguments: of `mlflow`, without what names the store.
    """
    # MLflow 3 discourages folders, and its command line refuses them unless it is told otherwise.
    allowed = ["MLFLOW_ALLOW_FILE_STORE=true"] if is_folder(uri) else []
    store = f"MLFLOW_TRACKING_URI={shlex.quote(without_secrets(uri))}"
    return " ".join([*allowed, store, shlex.join([_executable(), *arguments])])


def server_line(uri: str, port: int = 5000) -> str:
    """A line for a shell that serves a store to this machine, and to no other."""
    return shlex.join([_executable(), "server", "--backend-store-uri", uri, "--host", "127.0.0.1", "--port", str(port)])


def interface_lines(uri: str, experiment_id: str, run_id: str | None = None, port: int = 5000) -> list[str]:
    """What to type and where to look to see runs in MLflow's own interface.

    Args:
        uri: of the store.
        experiment_id: of the runs.
        run_id: of a single run; None: all of them side by side.
        port: for an interface that has to be started.
    """
    # Without the workflow MLflow opens its pages for language models.
    page = f"runs?workflowType=machine_learning&{view.QUERY}" if run_id is None else f"runs/{run_id}"
    path = f"#/experiments/{experiment_id}/{page}"
    if uri.startswith(("http://", "https://")):
        return [f"{'In' if run_id is None else 'in'} the browser: {without_secrets(uri).rstrip('/')}/{path}"]
    allowed = "MLFLOW_ALLOW_FILE_STORE=true " if is_folder(uri) else ""
    command = shlex.join([_executable(), "ui", "--backend-store-uri", without_secrets(uri), "--port", str(port)])
    see = "See the runs:" if run_id is None else "see the run:"
    return [f"{see} {allowed}{command}", f"{'then open:':{len(see)}} http://127.0.0.1:{port}/{path}"]


def is_folder(uri: str) -> bool:
    """Whether a store is a folder of files, which MLflow 3 discourages but still reads and writes."""
    return urlsplit(uri).scheme in ("", "file") and uri not in HOSTED


HOSTED = {"databricks", "uc", "databricks-uc"}
"""What MLflow takes for its services and not for folders of these names."""


def _executable() -> str:
    """The MLflow executable of this environment, as short as it can be typed."""
    # Not resolved: the interpreter of a virtual environment is a link that leads out of it.
    beside = Path(sys.executable).parent / "mlflow"
    if not beside.exists():
        return shutil.which("mlflow") or "mlflow"
    try:
        return str(beside.relative_to(Path.cwd()))
    except ValueError:
        return "mlflow" if shutil.which("mlflow") == str(beside) else str(beside)

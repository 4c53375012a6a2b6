"""A real `mlflow server` on loopback, which can be stopped, killed and started again under its address."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import pytest

from tests.support.processes import end, free_port

# Generous: on a loaded machine the server imports MLflow twice, 5-10 s each.
SERVER_STARTS_WITHIN_S = 180


class MLflowServer:
    """To be entered with `with`.

    Args:
        uri: of the store that it serves.
        log: file for its output.
        artifacts: folder of the artifacts that it takes from its clients; None: they write where the store says.
        environment: further variables of the process.
    """

    def __init__(
        self, uri: str, log: Path, artifacts: Path | None = None, environment: Mapping[str, str] | None = None
    ) -> None:
        port = free_port()
        self.address = f"http://127.0.0.1:{port}"
        self._log = log
        self._command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--workers", "1"]
        self._command += ["--host", "127.0.0.1", "--port", str(port)]
        if artifacts is not None:
            self._command += ["--artifacts-destination", str(artifacts)]
        self._environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
        # Evaluations of language models, for which it starts eight more processes that each import MLflow.
        self._environment |= {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        self._environment.pop("MLFLOW_TRACKING_URI", None)
        self._environment |= environment or {}
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> MLflowServer:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._process is not None:
            self.go_on()
            end(self._process, 20)

    def start(self) -> None:
        """Start it, and wait until it answers."""
        with self._log.open("ab") as out:
            # A session of its own, so that the server and the workers it starts can be ended together.
            self._process = subprocess.Popen(
                self._command, stdout=out, stderr=subprocess.STDOUT, env=self._environment, start_new_session=True
            )
        give_up = time.monotonic() + SERVER_STARTS_WITHIN_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > give_up:
                pytest.fail(f"mlflow server did not start:\n{self._log.read_text()[-3000:]}")
            time.sleep(0.3)

    def kill(self) -> None:
        """End it and its workers with SIGKILL."""
        assert self._process is not None
        self._signal(signal.SIGKILL)
        self._process.wait()

    def pause(self) -> None:
        """Stop it: connections are accepted by the kernel, and nobody answers."""
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """End a pause."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.address}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

"""A real browser and MLflow's real interface, for tests that look at what people see."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import free_port

# Generous: on a loaded machine the server imports MLflow twice, 5-10 s each.
SERVER_STARTS_WITHIN_S = 180


@contextmanager
def mlflow_ui(uri: str, artifacts: Path | None = None) -> Iterator[str]:
    """`mlflow server` on a free local port over the store `uri`; yields its address."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--workers", "1"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    if artifacts is not None:
        command += ["--artifacts-destination", str(artifacts)]
    environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    with tempfile.NamedTemporaryFile("w+", suffix=".log") as log:
        # A session of its own, so that the server and the workers it starts can be ended together.
        server = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            give_up = time.monotonic() + SERVER_STARTS_WITHIN_S
            while not _healthy(address):
                if server.poll() is not None or time.monotonic() > give_up:
                    pytest.fail(f"mlflow server did not start:\n{Path(log.name).read_text()[-3000:]}")
                time.sleep(0.3)
            yield address
        finally:
            with suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGTERM)
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)
                server.wait()


def _healthy(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


@contextmanager
def chromium(width: int = 1600, height: int = 1000) -> Iterator[Any]:
    """A headless Chromium with an empty profile, driven by selenium; skips the test where there is none."""
    binary = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("needs the system packages chromium and chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium (the dev extra)")
    from selenium.webdriver.chrome.service import Service

    # Its sockets and profile need a short path of its own; a leftover profile would make runs depend on each other.
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = binary
        for flag in (
            "--headless",
            "--no-sandbox",  # tests run as root in containers
            "--disable-gpu",
            "--disable-dev-shm-usage",  # /dev/shm is tiny in containers
            "--no-first-run",
            "--disable-background-networking",
            "--disable-sync",
            "--force-device-scale-factor=1",
            f"--user-data-dir={profile}",
            f"--window-size={width},{height}",
        ):
            options.add_argument(flag)
        browser = webdriver.Chrome(options=options, service=Service(driver))
        try:
            yield browser
        finally:
            browser.quit()

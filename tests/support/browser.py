"""A real browser and MLflow's real interface, for tests that look at what people see."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.mlflow_server import MLflowServer


@contextmanager
def mlflow_ui(uri: str, artifacts: Path | None = None) -> Iterator[str]:
    """`mlflow server` on a free local port over the store `uri`; yields its address."""
    with tempfile.TemporaryDirectory() as folder, MLflowServer(uri, Path(folder) / "server.log", artifacts) as server:
        yield server.address


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

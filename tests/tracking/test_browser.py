"""What a person sees who follows the line that `ssam-scale compare` prints: the runs, in MLflow's own pages."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ssam_scale.config.schema import Config
from ssam_scale.tracking.commands import interface_lines
from ssam_scale.tracking.compare import find_experiment
from ssam_scale.tracking.run import open_run
from ssam_scale.tracking.timer import PhaseSummary
from tests.support.browser import chromium, mlflow_ui

pytestmark = pytest.mark.slow

PATIENCE_S = 120
SIZES = {f"layer{i}.conv.weight": 1000 * 10**i for i in range(5)}


def record(config: Config, *, top1: float, step_s: float, fail: bool = False) -> str:
    """A short training's worth of metrics."""
    try:
        with open_run(config, enabled=True) as run:
            for step in range(50, 501, 50):
                if config.perturbation is not None and config.perturbation.mask is not None:
                    counts = {name: size * step / 500 for name, size in SIZES.items() if "0" not in name}
                    run.log_layers(counts, SIZES, step=step, steps="mean over the epoch that ends with step")
                window = PhaseSummary({"data": 0.01, "descent forward": 0.4 * step_s}, (step_s,) * 50)
                run.log_window(window, loss=2.3 - step / 500, lr=0.1, images_per_step=64, step=step)
            if fail:
                raise RuntimeError("loader died")
            run.log_evaluation(top1=top1, top5=99.0, loss=0.5, epoch=2, step=500)
            run.finish_summary()
    except RuntimeError:
        assert fail
    assert run.id is not None
    return run.id


def test_the_printed_address_shows_the_runs(config: Callable[..., Config], uri: str, tmp_path: Path) -> None:
    pytest.importorskip("selenium", reason="needs selenium (the dev extra)")
    from selenium.common.exceptions import TimeoutException
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    record(config("base"), top1=80.0, step_s=0.1)
    record(config("sam"), top1=82.0, step_s=0.2)
    depth = record(config("depth"), top1=81.9, step_s=0.15)
    record(config("base", run_name="broken loader"), top1=0.0, step_s=0.1, fail=True)
    with chromium() as browser, mlflow_ui(uri) as address:

        def page_shows(*texts: str) -> None:
            missing = list(texts)

            def shown(driver: object) -> bool:
                body = " ".join(browser.find_element(By.TAG_NAME, "body").text.split())
                missing[:] = [text for text in texts if text not in body]
                return not missing

            try:
                WebDriverWait(browser, PATIENCE_S, ignored_exceptions=[Exception]).until(shown)
                time.sleep(1)  # for the pictures: charts are drawn after their titles
            except TimeoutException:
                pytest.fail(f"{browser.current_url} does not show {missing}")
            finally:
                browser.save_screenshot(str(tmp_path / f"page {texts[0]}.png"))

        # The last line that the command prints, with the port of this test's server for the one it suggests.
        fragment = interface_lines(uri, find_experiment(uri, "ssam_scale")[1])[-1].partition("#")[2]
        browser.get(f"{address}/#{fragment}")
        page_shows("base resnet18", "sam resnet18", "ssam-depth resnet18", "broken loader", "Model registry", "summary")
        path, _, query = fragment.partition("?")
        for tab, texts in {
            "": ("About this run", "ssam-depth resnet18", "summary/step_time", "perturbation.mask.pattern", "Finished"),
            "/model-metrics": ("Add chart", "summary", "time", "descent_forward"),
            "/artifacts/config.yaml": ("config.yaml", "pattern: depth"),
        }.items():
            browser.get(f"{address}/#{path}/{depth}{tab}?{query.partition('&')[0]}")
            page_shows(*texts)
        # Of files in folders there is no address: they are clicked on.
        for word, texts in {
            "mask": ("density.csv", "density.png"),
            "density.csv": ("layer4.conv.weight", "10000000"),
            "density.png": (),
        }.items():
            browser.find_element(By.XPATH, f"//*[text()='{word}']").click()
            page_shows(*texts, "config.yaml")
        WebDriverWait(browser, PATIENCE_S).until(
            lambda _: max((i.size["width"] for i in browser.find_elements(By.TAG_NAME, "img")), default=0) > 200
        )
        browser.save_screenshot(str(tmp_path / "heat map.png"))

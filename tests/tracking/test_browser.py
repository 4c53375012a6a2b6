"""What a person sees who follows what `ssam-scale compare` prints: the runs in MLflow's own pages, and the report."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ssam_scale.cli.compare import compare_command
from ssam_scale.config.schema import Config
from ssam_scale.tracking.commands import interface_lines
from ssam_scale.tracking.compare import find_experiment
from ssam_scale.tracking.run import open_run
from ssam_scale.tracking.saving import Probe
from ssam_scale.tracking.timer import PhaseSummary
from tests.support.browser import chromium, mlflow_ui
from tests.support.stored import Course

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
                phases, times = {"data": 0.01, "descent forward": 0.4 * step_s}, (step_s,) * 50
                kind = {"base": "base", "sam": "dense"}.get(config.method, "sparse")
                window = PhaseSummary(phases, times, {kind: PhaseSummary(phases, times)})
                if config.perturbation is not None:
                    run.log_probe(Probe(0.08, 0.19, step_s - 0.01), seconds=1.0, step=step)
                loss, densities = 2.3 - step / 500, [] if config.perturbation is None else [0.5] * 50
                run.log_window(window, loss=loss, lr=0.1, images_per_step=64, step=step, densities=densities)
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
    depth, _ = (record(config("depth", seed=seed), top1=81.9 + seed, step_s=0.15) for seed in (0, 1))
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
        fragment = interface_lines(uri, find_experiment(uri, "ssam_scale").id)[-1].partition("#")[2]
        browser.set_window_size(2800, 900)  # columns out of sight are not there
        browser.get(f"{address}/#{fragment}")
        columns = ("mask", "plan", "density", "summary/top1", "saving/vs_dense_percent", "overhead/vs_base_percent")
        page_shows("base resnet18", "sam resnet18", "ssam-depth resnet18", "broken loader", "Model registry", *columns)
        browser.set_window_size(1600, 1000)
        path, _, query = fragment.partition("?")
        for tab, texts in {
            "": (
                "About this run",
                "ssam-depth resnet18",
                "less time than dense SAM",
                "summary/step_time",
                "perturbation.mask.pattern",
                "Finished",
            ),
            "/model-metrics": ("Add chart", "overhead", "saving", "summary", "time", "vs_base_percent"),
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


def test_the_report_shows_the_saving_wide_narrow_and_printed(
    config: Callable[..., Config], uri: str, finish: Callable[..., str], tmp_path: Path
) -> None:
    from selenium.webdriver.common.by import By

    probes = {"base": (), "sam": (100.0, 0.0, 0.0, 0.0), "depth": (50.0, 25.0, 24.0, 26.0)}
    layers = "parameter,weights,50,100\nstem.weight,100,0,0.5\nhead.weight,1000,1,1\n"
    for seed in (0, 1):
        for method, probed in probes.items():
            course = Course((60.0, 75.0, 81.0 + seed), 10.0, {"descent forward": 0.02, "ascent forward": 0.01})
            table = layers if method == "depth" else None
            made = config(method, seed=seed)
            finish(made, top1=81.0 + seed, ms=100.0, density=0.7, probed=probed, course=course, layers=table)
    compare_command(uri, html=tmp_path / "report.html", log=False, price=2.0)
    with chromium() as browser:

        def look(name: str, media: str, width: int) -> dict[str, str]:
            """What stands under each title in the row of the sparse method, after everything was seen to fit."""
            metrics = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": width < 800}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
            browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media})
            browser.get((tmp_path / "report.html").as_uri())
            height = browser.execute_script("return document.documentElement.scrollHeight")
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics | {"height": height})
            browser.save_screenshot(str(tmp_path / f"{name}.png"))
            too_wide = (
                "return [...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > "
                "innerWidth + 1 || e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).overflowX == 'auto')"
                ".map(e => e.outerHTML.slice(0, 99))"
            )
            assert browser.execute_script(too_wide) == []
            drawn = browser.execute_script("return [...document.images].map(i => i.complete && i.naturalWidth > 0)")
            assert drawn == [True] * 4
            (row,) = [
                row
                for row in browser.find_elements(By.CSS_SELECTOR, "tbody tr")
                if "ssam-depth" in row.find_element(By.TAG_NAME, "td").text
            ]
            cells = row.find_elements(By.TAG_NAME, "td")
            return {
                str(cell.get_attribute("data-title")): " ".join(cell.find_element(By.TAG_NAME, "span").text.split())
                for cell in cells
            }

        for name, media, width in (("wide", "screen", 1600), ("telephone", "screen", 400), ("printed", "print", 1030)):
            shown = look(name, media, width)
            assert shown["saving over SAM"] == "25% (24% to 26%)"
            assert shown["time / base"] == "1.50"
            assert shown["top-1 %"] == "81.50 ± 0.71"

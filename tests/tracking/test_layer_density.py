"""Per-layer densities: the table, the heat map that is really drawn, and what keeping them costs."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ssam_scale.config.schema import Config
from ssam_scale.tracking.layer_density import LayerDensities, draw, figure
from ssam_scale.tracking.run import Run, open_run
from ssam_scale.tracking.store import open_store
from ssam_scale.tracking.threads import Background

MakeConfig = Callable[..., Config]
SIZES = {"conv.weight": 1000, "norm, odd name": 10, "fc.weight": 40_000}
YELLOW, GREY = (253, 231, 36), (217, 217, 217)


def densities(columns: int, rows: int = 60) -> LayerDensities:
    """Everything in odd columns, nothing in even ones."""
    result = LayerDensities()
    sizes = {f"blocks.{i}.attn.qkv.weight": 10**6 for i in range(rows)}
    for i in range(columns):
        result.add(sizes if i % 2 else {}, sizes, 100 * i)
    return result


# ---- the table


def test_the_table_names_layers_and_steps_and_reads_back() -> None:
    given = LayerDensities()
    given.add({"conv.weight": 500, "fc.weight": 40_000}, SIZES, 0)
    given.add({"norm, odd name": 1}, SIZES, 1000)
    assert given.table() == (
        'parameter,weights,0,1000\nconv.weight,1000,0.5,0\n"norm, odd name",10,0,0.1\nfc.weight,40000,1,0\n'
    )
    again = LayerDensities.from_table(given.table())
    assert (again.sizes, again.steps, again.table()) == (SIZES, [0, 1000], given.table())
    for text in ("", "a,b,c\n", "parameter,weights,0\nconv,10\n", "parameter,weights,x\nconv,10,0.5\n"):
        with pytest.raises(ValueError, match=r"no table|invalid literal"):
            LayerDensities.from_table(text)


def test_a_resumed_run_makes_the_later_columns_again() -> None:
    given = LayerDensities()
    for step in (0, 10, 20, 30):
        given.add({}, SIZES, step)
    given.add({"conv.weight": 1000}, SIZES, 20)
    assert given.steps == [0, 10, 20]
    assert list(given.columns[-1]) == [1.0, 0.0, 0.0]
    given.add({}, {"another": 10}, 40)  # of another model
    assert (given.steps, list(given.sizes)) == ([40], ["another"])


def test_very_many_records_are_thinned_evenly() -> None:
    given = LayerDensities()
    for step in range(5000):
        given.add({"conv.weight": step % 1000}, SIZES, step)
    assert len(given.steps) <= 1000
    assert given.steps[0] == 0
    assert set(np.diff(given.steps)) == {8}
    assert [round(column[0] * 1000) for column in given.columns] == [step % 1000 for step in given.steps]


# ---- the picture


def test_the_picture_has_a_row_for_each_layer_and_a_column_for_each_record() -> None:
    made = figure(densities(7), "refreshed after step")
    axes = made.axes[0]
    (image,) = axes.images
    assert image.get_array().shape == (60, 7)
    assert image.get_array()[:, 3].tolist() == [1.0] * 60
    assert [label.get_text() for label in axes.get_yticklabels()][:2] == [
        "blocks.0.attn.qkv.weight  1M",
        "blocks.1.attn.qkv.weight  1M",
    ]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "100", "200", "300", "400", "500", "600"]
    assert axes.get_xlabel() == "refreshed after step"


@pytest.mark.parametrize(("columns", "rows"), [(1, 1), (7, 60), (90, 161)])
def test_what_is_in_the_file_is_what_was_recorded(columns: int, rows: int, tmp_path: Path) -> None:
    draw(densities(columns, rows), "refreshed after step", tmp_path / "density.png")
    with Image.open(tmp_path / "density.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert pixels.shape[1] >= 300
    assert pixels.shape[0] >= 12 * rows  # a label of 6 points fits into 12 pixels
    yellow, grey = ((pixels == colour).all(2) for colour in (YELLOW, GREY))
    assert grey.sum() > 1000
    line = pixels.shape[0] // 2
    # Along a line through the middle, the columns: grey and yellow in turn. The colour bar is above or beside it.
    heat = np.flatnonzero(grey.sum(0) + yellow.sum(0) > 0.5 * grey.sum(0).max())
    along = np.where(yellow[line], 1, np.where(grey[line], 2, 0))[heat[0] : heat[-1] + 1]
    runs = [int(along[0]), *(int(b) for a, b in pairwise(along) if a != b and b)]
    assert runs[:columns] == [2 if i % 2 == 0 else 1 for i in range(columns)]
    assert len(runs) - columns in (0, 1)  # the colour bar's yellow end may lie on the line of a small picture


def test_drawing_leaves_matplotlibs_global_state_alone(tmp_path: Path) -> None:
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    draw(densities(2, 2), "", tmp_path / "density.png")
    assert plt.get_fignums() == before


@pytest.mark.slow
@pytest.mark.parametrize("tried", [False, True], ids=["", "another package has tried to import it"])
@pytest.mark.parametrize("backend", ["module://no_such_package.backend", "svg"])
def test_pictures_do_not_depend_on_a_backend_inherited_from_a_notebook(
    backend: str, tried: bool, tmp_path: Path
) -> None:
    # In a process of its own, because matplotlib reads the variable when it is imported.
    program = (
        f"import contextlib\nwith contextlib.suppress(ValueError): {'import matplotlib' if tried else 'pass'}\n"
        "import os, pathlib; from ssam_scale.tracking.layer_density import LayerDensities, draw\n"
        "d = LayerDensities(); d.add({'a': 1}, {'a': 2}, 1); draw(d, 'steps', pathlib.Path('density.png'))\n"
        "import matplotlib; print(os.environ['MPLBACKEND'], matplotlib.get_backend())"
    )
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=os.environ | {"MPLBACKEND": backend, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    variable, chosen = done.stdout.split()
    assert variable == backend  # and so for what is started from here
    assert chosen == backend or backend != "svg"  # one that is there stays what pyplot would draw with
    with Image.open(tmp_path / "density.png") as picture:
        assert min(picture.size) > 100


# ---- in the background


def test_work_that_costs_pauses_and_only_the_newest_is_done() -> None:
    done: list[str] = []
    background = Background({"cheap": 0.0, "dear": 3600.0})

    def work(name: str, seconds: float) -> Callable[[], None]:
        def task() -> None:
            until = time.thread_time() + seconds
            while time.thread_time() < until:
                pass
            done.append(name)

        return task

    def wait_for(name: str) -> None:
        give_up = time.monotonic() + 30
        while name not in done and time.monotonic() < give_up:
            time.sleep(0.005)

    background.put("dear", work("dear", 0.0))  # expected to take an hour: not before the end
    background.put("cheap", work("first", 0.02))
    wait_for("first")
    for number in range(100):
        background.put("cheap", work(f"{number}", 0.0))  # 0.02 s at 0.4% are paid back after 5 s
    time.sleep(0.2)
    assert done == ["first"]
    background.close(30.0)
    assert sorted(done[1:]) == ["99", "dear"]


def test_what_fails_is_a_warning_and_what_hangs_is_left_behind(caplog: pytest.LogCaptureFixture) -> None:
    background = Background({"a": 0.0})
    background.put("a", lambda: Path("/nowhere/at/all").write_text(""))
    background.close(30.0)
    assert "a was not recorded: [Errno 2] No such file or directory" in caplog.text
    hung = threading.Event()
    background = Background({"a": 0.0})
    background.put("a", lambda: hung.wait(60) and None)
    began = time.monotonic()
    background.close(0.1)
    assert time.monotonic() - began < 10
    hung.set()


# ---- with a run


def artifacts(tmp_path: Path, run: Run) -> Path:
    return tmp_path / "mlartifacts/ssam_scale" / str(run.id) / "artifacts/mask"


def metrics(uri: str, run: Run) -> dict[str, Any]:
    found: dict[str, Any] = open_store(uri, create=False).get_run(run.id).data.metrics
    return found


def test_a_resumed_run_goes_on_with_table_and_picture(config: MakeConfig, uri: str, tmp_path: Path) -> None:
    with open_run(config("element"), enabled=True) as first:
        for step in (0, 10, 20):
            first.log_layers({"conv.weight": 100 * step / 10}, SIZES, step=step, steps="refreshed after step")
    small = Image.open(artifacts(tmp_path, first) / "density.png").size
    with open_run(config("element"), enabled=True, resume_run_id=first.id) as second:
        for step in range(20, 300, 10):
            second.log_layers({"conv.weight": 1000}, SIZES, step=step, steps="refreshed after step")
    assert second.id == first.id
    table = (artifacts(tmp_path, second) / "density.csv").read_text().splitlines()
    assert table[0].split(",") == ["parameter", "weights", *map(str, range(0, 300, 10))]
    assert table[1].split(",")[2:6] == ["0", "0.1", "1", "1"]
    assert Image.open(artifacts(tmp_path, second) / "density.png").size[0] > small[0]


def test_a_run_that_was_ended_has_them_too(config: MakeConfig, tmp_path: Path) -> None:
    def train(run: Run) -> None:
        with run:
            run.log_layers({}, SIZES, step=0, steps="")
            raise KeyboardInterrupt

    run = open_run(config("element"), enabled=True)
    with pytest.raises(KeyboardInterrupt):
        train(run)
    assert {p.name for p in artifacts(tmp_path, run).iterdir()} == {"density.csv", "density.png"}


def test_recording_does_not_hold_up_training(config: MakeConfig) -> None:
    sizes = {f"layer.{i}.weight": 1000 for i in range(160)}
    with open_run(config("element"), enabled=True) as run:
        times = []
        for step in range(100):
            began = time.thread_time()
            run.log_layers(sizes, sizes, step=step, steps="refreshed after step")
            times.append(time.thread_time() - began)
    # What this thread computed: a drawing takes a hundred times as long, and a busy machine does not count.
    assert sorted(times)[50] < 0.005


def test_a_run_without_masks_draws_nothing(config: MakeConfig, tmp_path: Path) -> None:
    with open_run(config(), enabled=True) as run:
        run.log({"train/loss": 1.0}, 1)
    assert not artifacts(tmp_path, run).exists()
    with open_run(config(), enabled=False) as disabled:
        disabled.log_layers({}, SIZES, step=0, steps="")


def test_a_refresh_says_what_is_known(config: MakeConfig, uri: str) -> None:
    with open_run(config("element"), enabled=True) as run:
        run.log_refresh(seconds=1.0, step=0, density=0.5, turnover=math.nan, samples=128)
    assert metrics(uri, run) == {"time/refresh": 1.0, "mask/density": 0.5, "mask/samples": 128.0}
    with open_run(config("element"), enabled=True) as run:
        run.log_refresh(seconds=2.0, step=10, density=0.4, turnover=0.25)
    assert metrics(uri, run) == {"time/refresh": 2.0, "mask/density": 0.4, "mask/turnover": 0.25}

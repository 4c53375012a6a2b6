"""The report of a comparison: a page that needs nothing else, runs nothing, and shows names as they are."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from ssam_scale.cli.compare import compare_command
from ssam_scale.config.schema import Config
from ssam_scale.tracking.compare import Question, compare
from ssam_scale.tracking.compare.figures import PHASE_COLOURS
from ssam_scale.tracking.compare.page import page
from ssam_scale.tracking.compare.record import PAGE, record
from ssam_scale.tracking.store import open_store, text_artifact
from ssam_scale.tracking.timer import PHASES
from tests.support.stored import Course

MakeConfig = Callable[..., Config]
Finish = Callable[..., str]

LAYERS = "parameter,weights,50,100\nstem.weight,100,0,0.5\n$head$ <b>.weight,1000,1,1\n"
PHASES_OF_A_STEP = {"data": 0.001, "descent forward": 0.02, "ascent backward": 0.03}
SVG = "{http://www.w3.org/2000/svg}"


class Tree(HTMLParser):
    """Elements of a page with their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    @property
    def pictures(self) -> list[tuple[str, ElementTree.Element]]:
        """Alternative text and drawing of each."""
        found = [attributes for tag, attributes in self.elements if tag == "img"]
        return [(str(a["alt"]), ElementTree.fromstring(_decoded(str(a["src"])))) for a in found]


def _decoded(source: str) -> bytes:
    kind, _, data = source.partition(",")
    assert kind == "data:image/svg+xml;base64"
    return base64.b64decode(data)


def words_of(drawing: ElementTree.Element) -> str:
    return " ".join("".join(each.itertext()) for each in drawing.iter(f"{SVG}text"))


@pytest.fixture
def compared(config: MakeConfig, uri: str, finish: Finish) -> None:
    """Two seeds of each of three methods, with evaluations, phases and a table of layers."""
    for seed in (0, 1):
        for method, top1, ms, probed in (
            ("base", 80.0, 100.0, ()),
            ("sam", 83.0, 200.0, (100.0, 0.0, 0.0, 0.0)),
            ("depth", 82.5, 150.0, (50.0, 25.0, 24.0, 26.0)),
        ):
            course = Course((60.0, 75.0, top1 + seed), ms / 10, PHASES_OF_A_STEP)
            layers = LAYERS if method == "depth" else None
            made = config(method, seed=seed)
            finish(made, top1=top1 + seed, ms=ms, probed=probed, course=course, layers=layers, density=0.7)


@pytest.mark.slow
@pytest.mark.usefixtures("compared")
def test_it_has_table_charts_and_how_each_number_was_measured(uri: str) -> None:
    tree = Tree(page(compare(uri, "ssam_scale")))
    text = " ".join(tree.text.replace("\N{NO-BREAK SPACE}", " ").split())
    for shown in ("ssam-depth", "83.00 ± 0.71", "25% (24% to 26%)", "Welch's t test", "By probes", "s to 80.00%"):
        assert shown in text
    alternatives, drawings = zip(*tree.pictures, strict=True)
    assert [each.partition(":")[0] for each in alternatives] == [
        "Accuracy against wall-clock",
        "Accuracy against overhead",
        "Where the time of a step goes",
        "Density of layers over time",
    ]
    assert "ssam-depth 83.00% after 45 s" in alternatives[0]
    assert "ssam-depth 83.00% at +50%" in alternatives[1]
    assert "base: data 1.0 ms, ascent backward 30.0 ms, descent forward 20.0 ms" in alternatives[2]
    assert "of all weights 91% at first and 95% in the end" in alternatives[3]
    for drawing, words in zip(
        drawings, ("seconds of training", "overhead over the base", "ms in a step", "$head$ <b>.weight"), strict=True
    ):
        assert words in words_of(drawing)


@pytest.mark.usefixtures("compared")
def test_it_runs_nothing_and_asks_nobody(uri: str) -> None:
    text = page(compare(uri, "ssam_scale"))
    tree = Tree(text)
    assert {tag for tag, _ in tree.elements} & {"script", "link", "iframe", "object", "form", "a", "base"} == set()
    for _, attributes in tree.elements:
        assert not any(name.startswith("on") or name in ("style", "href") for name in attributes)
    policy = next(str(a["content"]) for _, a in tree.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    for _, drawing in tree.pictures:
        for element in drawing.iter():
            assert not element.tag.endswith("script")
            links = [value for name, value in element.attrib.items() if name.endswith("href")]
            assert all(link.startswith(("#", "data:image/png;base64,")) for link in links)
    assert len(text) < 500_000


def test_names_are_shown_as_they_are(config: MakeConfig, uri: str, finish: Finish) -> None:
    name = '<script>alert(1)</script> $x_$ & "me" \''
    named = {"experiment": name, "group": name}
    for method, ms in (("base", 1.0), ("sam", 2.0)):
        finish(config(method, **named), top1=9.0, ms=ms, course=Course((9.0,), 1.0), group=name, backend="<i>$")
    finish(config("sam", **named), top1=9.0, ms=2.0, course=Course((9.0,), 1.0), group=name)
    tree = Tree(page(compare(uri, name, Question(group=name))))
    assert {"script", "i"} & {tag for tag, _ in tree.elements} == set()
    assert tree.text.count(name) >= 2
    assert "<i>$" in tree.text
    assert "sam <i>$" in words_of(tree.pictures[0][1])


def test_a_password_of_the_store_is_not_shown(config: MakeConfig, uri: str, finish: Finish) -> None:
    finish(config("base"), top1=9.0, ms=1.0)
    comparison = compare(uri, "ssam_scale")
    comparison.experiment.uri = "postgresql://me:secret@host/db"
    assert "me:***@host/db" in page(comparison)
    assert "secret" not in page(comparison)


@pytest.mark.slow
@pytest.mark.usefixtures("compared")
def test_mlflow_keeps_it_in_a_run_of_its_own_which_is_never_compared(
    uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = compare(uri, "ssam_scale").rows
    for _ in range(2):
        compare_command(uri, html=tmp_path / "report.html")
    written = (tmp_path / "report.html").read_text()
    out = capsys.readouterr().out
    kept = set(
        re.findall(rf"MLflow keeps it: http://127.0.0.1:5000/#/experiments/1/runs/(\w+)/artifacts/{PAGE}\n", out)
    )
    assert f"written: {tmp_path}/report.html" in out
    assert len(kept) == 1  # the same for the same runs
    (run_id,) = kept
    client = open_store(uri, create=False)
    assert text_artifact(client, run_id, PAGE) == written
    assert client.get_run(run_id).info.status == "FINISHED"
    assert compare(uri, "ssam_scale", Question(running=True)).rows == rows
    compare_command(uri, html=tmp_path / "other.html", log=False)
    assert "MLflow keeps" not in capsys.readouterr().out


def test_a_store_that_keeps_nothing_is_a_warning(
    config: MakeConfig, uri: str, finish: Finish, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    finish(config("base"), top1=9.0, ms=1.0)
    comparison = compare(uri, "ssam_scale")
    (tmp_path / "mlartifacts").write_text("a file where a folder belongs")
    assert record(comparison, "page") == []
    assert "MLflow did not keep the comparison (--no-log does not ask it to)" in caplog.text


def test_each_phase_of_a_step_has_a_colour() -> None:
    assert set(PHASE_COLOURS) == set(PHASES)

"""A comparison as one page that needs nothing else: table, charts, and how each number was measured.

The page is built as a tree, so that no name can become markup; it has no script, and its policy forbids any.
"""

from __future__ import annotations

import base64
import hashlib
from datetime import datetime, timezone
from xml.etree.ElementTree import Element, SubElement, tostring

from ssam_scale import __version__
from ssam_scale.tracking.compare.columns import columns
from ssam_scale.tracking.compare.figures import Picture, names, pictures
from ssam_scale.tracking.compare.rows import Comparison
from ssam_scale.tracking.redaction import without_secrets

# Cells that no longer fit beside each other stand below each other, each with its title.
_STYLE = """
:root { color-scheme: light; --ink: #1b1b1b; --faint: #5f5f5f; --line: #d9d9d9; --accent: #00589b; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem; max-width: 110rem; color: var(--ink); background: #fff;
  font: 1rem/1.5 system-ui, "DejaVu Sans", sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .25rem; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p { margin: .25rem 0; max-width: 60rem; }
.faint, figcaption, .note { color: var(--faint); font-size: .875rem; }
.warning { border-left: .25rem solid #d55e00; padding-left: .75rem; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .6rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th { border-bottom: 2px solid var(--ink); vertical-align: bottom; }
.words { text-align: left; }
td.words:first-child { font-weight: 600; }
sup { color: var(--accent); }
.wide { overflow-x: auto; }
.charts { display: grid; gap: 1.5rem; margin-top: 2rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 30rem), 1fr)); }
figure { margin: 0; break-inside: avoid; }
figure h2 { margin-top: 0; }
figure img { width: 100%; max-width: 44rem; height: auto; display: block; }
dl { columns: 26rem; column-gap: 2.5rem; margin: 0; }
dl div { break-inside: avoid; padding-bottom: .6rem; }
dt { font-weight: 600; }
dd { margin: 0; }
code { overflow-wrap: anywhere; font: .8125rem/1.4 ui-monospace, "DejaVu Sans Mono", monospace; }
@media screen and (max-width: 100rem) {
  table { font-size: .75rem; }
  th, td { padding: .3rem; }
}
@media screen and (max-width: 75rem) {
  table { font-size: .875rem; }
  body { padding: 1rem; }
  table, tbody, tr, td { display: block; width: 100%; }
  thead { display: none; }
  tr { border-top: 2px solid var(--ink); padding: .5rem 0; }
  td { display: flex; justify-content: space-between; gap: 1rem; text-align: right; border: 0;
    padding: .15rem 0; }
  td::before { content: attr(data-title); color: var(--faint); text-align: left; flex: none; max-width: 50%; }
  td.words:first-child { font-size: 1.05rem; }
  td.words:first-child::before { content: none; }
}
@media print {
  @page { size: A4 landscape; margin: 12mm; }
  html { font-size: 8.5pt; }
  body { padding: 0; max-width: none; }
  table { font-size: 6.5pt; }
  th, td { padding: .2rem .25rem; }
  .wide { overflow: visible; }
  tr { break-inside: avoid; }
  h2 { break-after: avoid; }
  .charts { grid-template-columns: 1fr 1fr 1fr; gap: 1rem; }
}
"""


def page(comparison: Comparison) -> str:
    """The whole page as text. Reads what its charts need of the runs' histories."""
    html = Element("html", lang="en")
    head = SubElement(html, "head")
    SubElement(head, "meta", charset="utf-8")
    policy = {"http-equiv": "Content-Security-Policy", "content": _policy()}
    SubElement(head, "meta", policy)
    SubElement(head, "meta", name="viewport", content="width=device-width, initial-scale=1")
    SubElement(head, "meta", name="referrer", content="no-referrer")
    _text(head, "title", f"{comparison.experiment.name}: comparison of runs")
    _text(head, "style", _STYLE)
    body = SubElement(html, "body")
    _heading(body, comparison)
    _table(body, comparison)
    charts = SubElement(body, "div", {"class": "charts"})
    for picture in pictures(comparison):
        _chart(charts, picture)
    _measured(body, comparison)
    _runs(body, comparison)
    return "<!DOCTYPE html>\n" + tostring(html, encoding="unicode", method="html") + "\n"


def _policy() -> str:
    """Pictures of the page's own and its one style, known by its digest; nothing else, and nothing from elsewhere."""
    digest = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
    return f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"


def _text(parent: Element, tag: str, text: str, **attributes: str) -> Element:
    made = SubElement(parent, tag, {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items()})
    made.text = text
    return made


def _heading(body: Element, comparison: Comparison) -> None:
    experiment, question = comparison.experiment, comparison.question
    _text(body, "h1", experiment.name)
    runs = sum(row.runs for row in comparison.rows)
    group = "" if question.group is None else f", group {question.group}"
    now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    _text(
        body,
        "p",
        f"{runs} run{'s'[: runs != 1]}{group} of {without_secrets(experiment.uri)}, compared {now} by ssam_scale "
        f"{__version__}",
        class_="faint",
    )
    for line in comparison.differences:
        _text(body, "p", f"Compared nevertheless: {line}", class_="warning")


def _table(body: Element, comparison: Comparison) -> None:
    shown = columns(comparison)
    notes: list[str] = []
    table = SubElement(SubElement(body, "div", {"class": "wide"}), "table")
    head = SubElement(SubElement(table, "thead"), "tr")
    for column in shown:
        _text(head, "th", column.title, class_="words" if column.words else "number", scope="col")
    rows = SubElement(table, "tbody")
    for row in comparison.rows:
        line = SubElement(rows, "tr")
        for column in shown:
            cell = SubElement(line, "td", {"class": "words" if column.words else "number", "data-title": column.title})
            # In an element of its own: of a cell that is a title and a value, the value stays in one piece.
            value = _text(cell, "span", column.cell(row) if column.words else _in_pieces(column.cell(row)))
            marks = []
            for note in dict.fromkeys(column.notes(row)):
                if note not in notes:
                    notes.append(note)
                marks.append(str(notes.index(note) + 1))
            if marks:
                _text(value, "sup", f" {', '.join(marks)}")
    for number, note in enumerate(notes, 1):
        _text(body, "p", f"{number}: {note}", class_="note")


def _in_pieces(number: str) -> str:
    """A number that may be broken before its bracket only."""
    return " (".join(part.replace(" ", "\N{NO-BREAK SPACE}") for part in number.split(" ("))


def _chart(charts: Element, picture: Picture) -> None:
    figure = SubElement(charts, "figure")
    _text(figure, "h2", picture.title)
    data = base64.b64encode(picture.svg.encode()).decode()
    # As a picture of its own: names within it cannot clash with those of another, and nothing in it can run.
    SubElement(figure, "img", src=f"data:image/svg+xml;base64,{data}", alt=f"{picture.title}: {picture.alternative}")
    _text(figure, "figcaption", picture.caption)


def _measured(body: Element, comparison: Comparison) -> None:
    _text(body, "h2", "How each number was measured")
    found = SubElement(body, "dl")
    for column in columns(comparison):
        if column.how:
            entry = SubElement(found, "div")
            _text(entry, "dt", column.title)
            _text(entry, "dd", column.how)


def _runs(body: Element, comparison: Comparison) -> None:
    _text(body, "h2", "Runs")
    found = SubElement(body, "dl")
    for name, row, group in zip(names(comparison.rows), comparison.rows, comparison.groups, strict=True):
        entry = SubElement(found, "div")
        _text(entry, "dt", name)
        where = group.tags.get("hardware", "unknown hardware")
        world = group.tags.get("world_size", "?")
        line = _text(entry, "dd", f"{row.backend}, {world} process{'es'[: 2 * (world != '1')]}, {where}: ")
        _text(line, "code", " ".join(row.run_ids))

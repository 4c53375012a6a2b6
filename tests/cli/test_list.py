"""`ssam-scale list`: every kind, as a table and as JSON."""

from __future__ import annotations

import json
from typing import Any, get_args

import pytest

from ssam_scale.cli.list import KINDS
from ssam_scale.config.augment_sections import Augment
from ssam_scale.config.mask_sections import Score
from ssam_scale.config.schema import RhoSchedule, Sharding, Tracking
from tests.support.runs import ssam_scale


def listed(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    assert ssam_scale("list", *arguments, "--json") == 0
    rows: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return rows


def names(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    return [row["name"] for row in listed(capsys, *arguments)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_has_the_names_lines_and_papers_of_the_json(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = listed(capsys, kind)
    assert ssam_scale("list", kind) == 0
    lines = capsys.readouterr().out.splitlines()
    for row in rows:
        [line] = [line for line in lines if line.startswith(f"│ {row['name']} ")]
        cells = [cell.strip() for cell in line.strip("│").split("│")]
        count = [str(row["count"])] if kind == "models" else []
        assert cells == [row["name"], row["summary"], row["paper"] or "—", *count]
    assert any("arXiv" in row["paper"] for row in rows) or kind == "trackers"


def test_what_is_listed_is_what_a_configuration_takes(capsys: pytest.CaptureFixture[str]) -> None:
    assert names(capsys, "masks") == ["block", "depth", "element", "named", "nm", "norm", "row", "tensor"]
    assert names(capsys, "directions") == ["fresh", "friendly", "momentum", "previous", "vasso"]
    assert names(capsys, "trajectories") == ["mesa", "saf"]
    assert names(capsys, "scores") == sorted(get_args(Score))
    assert names(capsys, "schedules") == [*sorted(get_args(RhoSchedule)), "interval", "window"]
    sections = get_args(get_args(Augment)[0])
    policies = [policy for s in sections for policy in get_args(s.model_fields["policy"].annotation)]
    assert names(capsys, "policies") == sorted(policies)
    (trackers, _) = get_args(Tracking.model_fields["trackers"].annotation)
    assert names(capsys, "trackers") == sorted(get_args(trackers))
    backends = set(get_args(Sharding.model_fields["backend"].annotation)) - {"auto"}
    assert set(names(capsys, "backends")) == backends


def test_a_word_narrows_it_down(capsys: pytest.CaptureFixture[str]) -> None:
    assert names(capsys, "masks", "n") == ["element", "named", "nm", "norm", "tensor"]
    [row] = listed(capsys, "models", "resnet50_")
    assert row["name"] == "ResNet"
    assert row["count"] == len(row["models"])
    assert all("resnet50_" in model for model in row["models"])
    assert ssam_scale("list", "models", "convnext_tiny") == 0
    assert "convnext_tiny" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["maskz"],
            "list maskz: there are masks, directions, trajectories, scores, schedules, policies, backends, trackers "
            "and models; did you mean masks?",
        ),
        (
            ["xyz"],
            "list xyz: there are masks, directions, trajectories, scores, schedules, policies, backends, trackers and "
            "models",
        ),
        (["masks", "hexagon"], "list masks hexagon: no name has 'hexagon' in it"),
    ],
)
def test_what_there_is_not(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ssam_scale("list", *arguments) == 2
    assert capsys.readouterr().err == f"ssam-scale: error: {message}\n"

"""Named methods: each expands into settings that a configuration takes, and contradicts nobody in silence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ssam_scale.config.load import dump, load
from ssam_scale.config.presets import PRESETS, TERMS
from ssam_scale.errors import UserError
from ssam_scale.train.build import perturbation_options
from ssam_scale.train.length import Length
from tests.support.configs import SMALL
from tests.support.runs import ssam_scale

OF_A_MASK = "  rho: 0.2\n  mask:\n    pattern: depth\n    cut: [0.25, 0.75]\n"


@pytest.fixture
def named(tmp_path: Path) -> Any:
    """Loads the small configuration with this below `perturbation`."""

    def load_it(section: str, *overrides: str) -> Any:
        path = tmp_path / "run.yaml"
        path.write_text(SMALL.replace(OF_A_MASK, section))
        return load(path, overrides)

    return load_it


def flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    result = {}
    for key, value in settings.items():
        below = flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {}
        result |= below or {prefix + key: value}
    return result


@pytest.mark.parametrize("name", PRESETS)
def test_a_method_is_its_settings_and_what_is_printed_is_read_as_the_same(
    name: str, named: Any, tmp_path: Path
) -> None:
    config = named(f"  preset: {name}\n")
    section = config.model_dump(mode="json")["perturbation"]
    has = flat(section)
    for settings in (PRESETS[name].point, PRESETS[name].start):
        for key, value in flat(settings).items():
            if value == {}:  # a section with its own defaults
                assert any(k.startswith(f"{key}.") for k in has)
            else:
                assert has[key] == value, key
    printed = tmp_path / "printed.yaml"
    printed.write_text(dump(config))
    assert load(printed) == config
    perturbation_options(config, Length.of_epochs(3, 10, 1))  # what SparseSAM is given


@pytest.mark.parametrize("name", PRESETS)
def test_what_a_method_leaves_open_can_be_set(name: str, named: Any) -> None:
    assert named(f"  preset: {name}\n  rho: 0.7\n").perturbation.rho == 0.7
    assert named(f"  preset: {name}\n", "perturbation.rho=0.7").perturbation.rho == 0.7


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            "  preset: msam\n  direction: {source: fresh}\n",
            "msam has direction.source: momentum, and it is given as fresh",
        ),
        ("  preset: sam\n  mask: {pattern: norm}\n", "sam has mask: null, and it is given as {pattern: norm}"),
        ("  preset: asam\n  adaptive: false\n", "asam has adaptive: true, and it is given as false"),
        (
            "  preset: moving-cut\n  mask: null\n",
            "moving-cut has mask: {pattern: depth, policy: rotate}, and it is given",
        ),
        (
            "  preset: moving-cut\n  mask: {pattern: row}\n",
            "moving-cut has mask.pattern: depth, and it is given as row",
        ),
    ],
)
def test_what_contradicts_a_method_is_one_line_with_both_places(section: str, message: str, named: Any) -> None:
    with pytest.raises(UserError) as refused:
        named(section)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert "run.yaml:12, " in str(refused.value)  # where the method is named


def test_a_method_that_is_misspelt_is_told_the_nearest(named: Any) -> None:
    with pytest.raises(UserError, match=r"perturbation\.preset: .*\"msan\".*did you mean msam\?"):
        named("  preset: msan\n  rho: 0.1\n")


def test_the_command_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert ssam_scale("methods", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == [*PRESETS, *TERMS]
    [msam] = [row for row in rows if row["name"] == "msam"]
    assert (msam["settings"], msam["cost"]) == ("direction.source=momentum, rho=3.0", "1")
    [mesa] = [row for row in rows if row["name"] == "mesa"]
    assert mesa["settings"].startswith("trajectory.kind=mesa, trajectory.weight=0.8")
    assert ssam_scale("methods", "look") == 0
    out = capsys.readouterr().out
    assert "interval=5" in out
    assert "arXiv" in out
    assert ssam_scale("methods", "msan") == 2
    assert "methods msan: no name has 'msan' in it; did you mean msam?" in capsys.readouterr().err


@pytest.mark.parametrize(
    "section",
    [
        "  preset: ae-sam\n  gate: null\n",
        "  preset: gsam\n  gap: 0.0\n",
        "  preset: looksam\n  reuse: 0.0\n",
        "  preset: late-sam\n  window: [0.0, 1.0]\n",
    ],
)
def test_what_makes_a_method_is_not_switched_off_under_its_name(section: str, named: Any) -> None:
    with pytest.raises(UserError, match="is nothing of the kind with"):
        named(section)


def test_a_preset_that_is_no_name_is_one_line(named: Any) -> None:
    with pytest.raises(UserError, match=r"perturbation\.preset"):
        named("  preset: [a]\n  rho: 0.1\n")


@pytest.mark.parametrize("name", TERMS)
def test_a_method_that_is_a_loss_term_is_the_defaults_of_its_kind(name: str, named: Any, tmp_path: Path) -> None:
    config = named("  rho: 0.1\n", f"trajectory={{kind: {name}}}", "train.epochs=9")
    term = TERMS[name]
    assert config.model_dump(mode="json")["trajectory"] == {**term.point, **term.start}
    printed = tmp_path / "printed.yaml"
    printed.write_text(dump(config))
    assert load(printed) == config


def test_a_loss_term_is_no_preset_of_a_perturbation(named: Any) -> None:
    with pytest.raises(UserError, match=r"mesa is a loss term and no perturbation; write 'trajectory=\{kind: mesa\}'"):
        named("  preset: mesa\n  rho: 0.1\n")

"""Tables on terminals of any width: nothing sticks out, no word and no number is broken."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from ssam_scale.cli import bench, cost
from ssam_scale.cli.list import KINDS
from ssam_scale.cli.table import Sheet

_NOTE = "[1] no finished run of dense SAM with resnet18, batch 64, 32 px, fp32, ddp on 2 process(es), on this hardware"

SHEETS = {
    "compare": Sheet(
        ["method", "mask", "density", "runs", "top-1 %", "step ms", "time / base", "saving over SAM"],
        [
            ["base", "—", "—", "3", "82.00 ± 2.00", "100.0", "1.00", "50%"],
            ["ssam-depth", "depth rotate 0.25–0.75", "70%", "1", "84.50", "150.0", "1.50", "25%"],
            ["ssam-element", "element sampled fisher", "20%", "1", "83.50", "12205.0", "— [1]", "—"],
        ],
        _NOTE,
        words=2,
    ),
    **{
        name: Sheet(
            ["plan", *columns], [["a moving cut", *(["12,345.678"] * len(columns))]] * 2, "some processor; torch"
        )
        for name, columns in {
            **{
                f"bench {name[1:].lower()}": getattr(bench, name) for name in ("_MASKS", "_STORAGE", "_STEPS", "_BYTES")
            },
            "bench memory": bench._PEAK,
            "cost": cost._COLUMNS,
            "cost --dry-run": cost._DRY_COLUMNS,
        }.items()
    },
    **{
        f"list {kind}": Sheet(
            ["name", "what it is", "paper"],
            [[row["name"], row["summary"], row["paper"] or "—"] for row in rows_of("")],
            caption,
            words=3,
        )
        for kind, (caption, rows_of) in KINDS.items()
        if kind != "models"  # whose count takes seconds
    },
}


def lines_of(sheet: Sheet, width: int) -> list[str]:
    console = Console(width=width, file=io.StringIO(), record=True, markup=False, highlight=False)
    console.print(sheet)
    return console.export_text().splitlines()


@pytest.mark.parametrize("width", [60, 80, 100, 160])
@pytest.mark.parametrize("name", SHEETS)
def test_no_word_and_no_number_is_broken(name: str, width: int) -> None:
    sheet = SHEETS[name]
    lines = lines_of(sheet, width)
    assert max(map(len, lines)) <= width
    there = " ".join(lines).split()
    cells = [sheet.caption, *sheet.titles[1:], *(cell for row in sheet.rows for cell in row)]
    assert {word for cell in cells for word in cell.split()} <= set(there)
    for row in sheet.rows:  # numbers are one line each, however many words they have
        assert all(any(number in line for line in lines) for number in row[sheet.words :])


def test_a_comparison_is_a_grid_at_80_columns_and_blocks_at_60() -> None:
    wide, narrow = lines_of(SHEETS["compare"], 80), lines_of(SHEETS["compare"], 60)
    assert any(line.split() == ["base", "—", "—", "3", "82.00", "±", "2.00", "100.0", "1.00", "50%"] for line in wide)
    assert "ssam-depth" in narrow
    assert "    mask             depth rotate 0.25–0.75" in [line.rstrip() for line in narrow]


def test_a_narrow_terminal_does_without_what_can_be_spared_and_says_so() -> None:
    full = SHEETS["compare"]
    sheet = Sheet(full.titles, full.rows, full.caption, words=2, spare=["density", "step ms", "runs"])
    assert lines_of(sheet, 100) == lines_of(full, 100)
    lines = lines_of(sheet, 64)
    assert any(line.split() == ["base", "—", "3", "82.00", "±", "2.00", "1.00", "50%"] for line in lines)
    assert "left out for want of width: density, step ms" in [line.rstrip() for line in lines]
    assert lines_of(sheet, 40) == lines_of(full, 40)  # blocks have room for all

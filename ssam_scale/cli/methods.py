"""`ssam-scale methods`: every named method, the point of the space that it is, and what it costs."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from ssam_scale.cli.table import AsJson, Sheet
from ssam_scale.console import console
from ssam_scale.errors import UserError

_CAPTION = (
    "perturbation.preset: NAME in a configuration expands into these settings (`ssam-scale train --print-config`), of "
    "which rho and what else the method leaves open can be set beside it. cost: a step's arithmetic over the base "
    "optimizer's; `ssam-scale cost` predicts yours. Settings of trajectory are a section of their own, beside "
    "perturbation: null or any other"
)


def methods_command(
    word: Annotated[str, typer.Argument(help="Only what has this word in its name.")] = "", as_json: AsJson = False
) -> None:
    """List the named methods: settings, cost, paper, and what each refuses."""
    from ssam_scale.config.presets import PRESETS, TERMS, in_words

    rows = [
        {
            "name": name,
            "summary": preset.summary,
            "settings": in_words(preset, prefix),
            "cost": preset.cost,
            "paper": preset.paper,
            "refuses": preset.refuses,
        }
        for methods, prefix in ((PRESETS, ""), (TERMS, "trajectory."))
        for name, preset in methods.items()
        if word in name
    ]
    if not rows:
        from ssam_scale.config.spelling import nearest

        names = [*PRESETS, *TERMS]
        near = nearest(word, names)
        hint = f"; did you mean {near}?" if near else f"; there are {', '.join(names)}"
        raise UserError(f"methods {word}: no name has {word!r} in it{hint}")
    if as_json:
        print(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    titles = ["name", "what it is", "settings", "cost", "paper", "refuses"]
    cells = [[row[key] or "—" for key in ("name", "summary", "settings", "cost", "paper", "refuses")] for row in rows]
    console().print(Sheet(titles, cells, _CAPTION, words=6))

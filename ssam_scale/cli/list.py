"""`ssam-scale list`: what a configuration can name."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any

import typer

from ssam_scale.cli.table import AsJson, Sheet
from ssam_scale.console import console
from ssam_scale.errors import UserError

Row = dict[str, Any]  # name, summary, paper; of models also how many they are and their names


def list_command(
    kind: Annotated[
        str,
        typer.Argument(
            help="masks, directions, trajectories, scores, schedules, policies, backends, trackers or models.",
            show_default=False,
        ),
    ],
    word: Annotated[str, typer.Argument(help="Only what has this word in its name; of models, which they are.")] = "",
    as_json: AsJson = False,
) -> None:
    """List what a configuration can name: masks, directions, loss terms, scores, schedules, backends and more."""
    if kind not in KINDS:
        from ssam_scale.config.spelling import nearest

        near = nearest(kind, KINDS)
        hint = f"; did you mean {near}?" if near else ""
        raise UserError(f"list {kind}: there are {', '.join(list(KINDS)[:-1])} and {list(KINDS)[-1]}{hint}")
    key, rows_of = KINDS[kind]
    rows = rows_of(word)
    if not rows:
        raise UserError(f"list {kind} {word}: no name has {word!r} in it")
    if as_json:
        print(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    titles = ["name", "what it is", "paper", *(["timm models"] if kind == "models" else [])]
    cells = [
        [row["name"], row["summary"], row["paper"] or "—", *([str(row["count"])] if kind == "models" else [])]
        for row in rows
    ]
    console().print(Sheet(titles, cells, key, words=3))
    if kind == "models" and word:
        console().print(", ".join(name for row in rows for name in row["models"]))


def _masks(word: str) -> list[Row]:
    from ssam_scale.masks import MASKS

    return _rows(MASKS, word)


def _directions(word: str) -> list[Row]:
    from ssam_scale.perturbation.directions import DIRECTIONS

    return _rows(DIRECTIONS, word)


def _trajectories(word: str) -> list[Row]:
    from ssam_scale.methods import TRAJECTORIES

    return _rows(TRAJECTORIES, word)


def _policies(word: str) -> list[Row]:
    from ssam_scale.data.policies import POLICIES

    return _rows(POLICIES, word)


def _scores(word: str) -> list[Row]:
    from ssam_scale.perturbation.scores import SCORES

    return _rows(SCORES, word)


def _schedules(word: str) -> list[Row]:
    from ssam_scale.perturbation.schedules import RADIUS_SCHEDULES, WRAPPERS

    return _rows(RADIUS_SCHEDULES, word) + _rows(WRAPPERS, word)


def _backends(word: str) -> list[Row]:
    from ssam_scale.sharding import BACKENDS

    return _rows(BACKENDS, word)


def _trackers(word: str) -> list[Row]:
    from ssam_scale.tracking.tracker import TRACKERS

    return _rows(TRACKERS, word)


def _models(word: str) -> list[Row]:
    from ssam_scale.models import FAMILIES

    rows = []
    for entry in _sorted(FAMILIES):
        models = entry.value.models(word)
        if models:
            row = {"name": entry.name, "summary": entry.summary, "paper": entry.paper}
            rows.append({**row, "count": len(models), "models": models})
    return rows


def _rows(registry: Any, word: str) -> list[Row]:
    return [
        {"name": entry.name, "summary": entry.summary, "paper": entry.paper}
        for entry in _sorted(registry)
        if word in entry.name
    ]


def _sorted(registry: Any) -> list[Any]:
    return [registry[name] for name in sorted(registry)]


KINDS: dict[str, tuple[str, Callable[[str], list[Row]]]] = {
    "masks": ("perturbation.mask.pattern; null perturbs all weights (dense SAM)", _masks),
    "directions": ("perturbation.direction.source; named methods are listed by `ssam-scale methods`", _directions),
    "trajectories": ("trajectory.kind: a loss term by outputs of earlier weights", _trajectories),
    "scores": ("perturbation.mask.score, and drop and grow of perturbation.mask.dynamic", _scores),
    "schedules": ("perturbation.rho_schedule; interval and window are keys of perturbation themselves", _schedules),
    "policies": ("data.augment.policy: what is done to training crops", _policies),
    "backends": ("sharding.backend", _backends),
    "trackers": ("tracking.trackers, a list; with tracking: null a run is recorded nowhere", _trackers),
    "models": ("model.name takes any timm model; the patterns depth and block need one of these, in stages", _models),
}

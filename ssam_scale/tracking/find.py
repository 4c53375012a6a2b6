"""One run of a store, by its id or its name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from ssam_scale.errors import UserError
from ssam_scale.tracking.compare.runs import find_experiment
from ssam_scale.tracking.redaction import without_secrets
from ssam_scale.tracking.store import one_line, open_store

_SHOWN = 4


@dataclass(frozen=True)
class FoundRun:
    """A run as MLflow has it.

    Attributes:
        id: MLflow's.
        name: MLflow's.
        params: its parameters, among them the keys of its configuration.
    """

    id: str
    name: str
    params: Mapping[str, str]


def find_run(uri: str, experiment: str, wanted: str) -> FoundRun:
    """A run of a store; nothing is created there.

    Args:
        uri: MLflow tracking URI.
        experiment: in which a name is looked for; an id is one of the whole store.
        wanted: the run's id, or its name.

    Raises:
        UserError: the store cannot be read, has no such run, or several of the name.
    """
    if re.fullmatch(r"[0-9a-f]{32}", wanted):
        client = open_store(uri, create=False)
        try:
            return _found(client.get_run(wanted))
        except Exception as error:  # MLflow lets its stores' errors through, of every kind
            raise UserError(f"run {wanted}: {without_secrets(uri)} has none of this id ({one_line(error)})") from error
    found = find_experiment(uri, experiment)
    runs, token = [], None
    try:
        while True:
            page = found.client.search_runs([found.id], page_token=token)
            runs += list(page)
            if not (token := page.token):
                break
    except Exception as error:
        raise UserError(f"tracking.uri {without_secrets(uri)}: {one_line(error)}") from error
    named = [run for run in runs if run.info.run_name == wanted]
    if len(named) == 1:
        return _found(named[0])
    where = f"experiment {experiment!r} of {without_secrets(uri)}"
    if named:
        ids = ", ".join(run.info.run_id for run in named[:_SHOWN])
        raise UserError(f"run {wanted!r}: {len(named)} of {where} are called so; give an id: {ids}")
    names = sorted({str(run.info.run_name) for run in runs})
    near = ", ".join(map(repr, get_close_matches(wanted, names, n=_SHOWN, cutoff=0.3) or names[:_SHOWN]))
    raise UserError(f"run {wanted!r}: none of {where} is called so" + (f"; there are {near}" if near else ""))


def _found(run: Any) -> FoundRun:
    return FoundRun(run.info.run_id, run.info.run_name or "", run.data.params)

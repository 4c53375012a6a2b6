"""What finished runs say about each other: accuracy, step time, time over base, saving over dense SAM."""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from statistics import fmean, stdev
from typing import Any, cast

from ssam_scale.errors import UserError
from ssam_scale.tracking.describe import mask_words
from ssam_scale.tracking.moved import follow_moved
from ssam_scale.tracking.redaction import without_secrets
from ssam_scale.tracking.store import one_line, open_store, sqlite_path

_log = logging.getLogger(__name__)

# Parameters that do not make a run another experiment: seeds are pooled, the rest changes no result.
_POOLED = (
    "train.seed",
    "train.micro_batch",
    "train.max_micro_batch",
    "tracking.",
    "checkpoint.",
    "data.workers",
    "data.eval_batch_size",
)

# A ratio of times means something only where all of these are the same.
_TIME_PARAMS = (
    "model.name",
    "data.batch_size",
    "data.resolution",
    "train.precision",
    "train.accumulation",
    "train.activation_checkpointing",
    "train.compile",
)
_TIME_TAGS = ("backend", "world_size", "hardware")

_PAGE = 500


@dataclass(frozen=True)
class Row:
    """Runs that differ only in their seed.

    Attributes:
        method: `base`, `sam`, `ssam-<pattern>` or `ssam-dynamic`.
        model: timm's name.
        backend: how the weights were shared out.
        mask: which weights are perturbed, in words; empty for the base optimizer.
        settings: what tells this row from others of the same method, mask and model, but for the backend; empty if
            nothing else is needed.
        density: share of the weights that is perturbed, 0 to 1; None for the base optimizer or if it is not known.
        runs: how many, the latest of each seed.
        top1: mean accuracy after the last epoch, percent.
        top1_sd: its sample standard deviation; None for one run.
        step_seconds: mean over the runs of their median step times.
        time_over_base: step time divided by that of the base optimizer alone.
        saving_over_sam: 1 − step time / that of dense SAM.
        saving_interval: of it, the bounds of a 95% interval; None where it is not known.
        by_probes: whether these two are measured inside of the runs (`tracking.saving`) rather than between them.
        notes: why a value is missing, or between which runs it is.
        run_ids: MLflow's ids of the runs that count.
    """

    method: str
    model: str
    backend: str
    mask: str
    settings: str
    density: float | None
    runs: int
    top1: float | None
    top1_sd: float | None
    step_seconds: float | None
    time_over_base: float | None
    saving_over_sam: float | None
    saving_interval: tuple[float, float] | None
    by_probes: bool
    notes: tuple[str, ...]
    run_ids: tuple[str, ...]


@dataclass
class _Group:
    """The runs of one row while it is being computed."""

    params: dict[str, str]
    tags: dict[str, str]
    runs: list[Any]

    @property
    def method(self) -> str:
        return self.tags.get("method", "unknown")

    @property
    def model(self) -> str:
        return self.params.get("model.name", "unknown")

    @property
    def backend(self) -> str:
        return self.tags.get("backend", "unknown")

    @property
    def mask(self) -> str:
        return mask_words(self.method, self.params)

    @property
    def ascends_densely(self) -> bool:
        """Whether it is dense SAM in every step, as far as its parameters say."""
        usual = {"fraction": "1.0", "interval": "1", "window": "[0.0, 1.0]", "savings.within_shard_group": "false"}
        return all(self.params.get(f"perturbation.{key}", value) == value for key, value in usual.items())

    @property
    def latest(self) -> int:
        return max(run.info.start_time for run in self.runs)

    def timing(self) -> tuple[str, ...]:
        return (
            *(self.params.get(key, "") for key in _TIME_PARAMS),
            *(self.tags.get(key, "") for key in _TIME_TAGS),
        )

    def distinct(self) -> dict[str, str]:
        """Parameters that make this group what it is."""
        return {key: value for key, value in self.params.items() if not key.startswith(_POOLED)}

    def identity(self) -> dict[str, str]:
        """All that makes it a row of its own: parameters, and where it ran."""
        return self.distinct() | {key: self.tags.get(key, "—") for key in _TIME_TAGS}

    def mean(self, metric: str) -> float | None:
        found = self.values(metric)
        return fmean(found) if found else None

    def values(self, metric: str) -> list[float]:
        return [run.data.metrics[metric] for run in self.runs if metric in run.data.metrics]


def compare(uri: str, experiment: str, *, group: str | None = None) -> list[Row]:
    """Rows of all finished runs of an experiment, base first, then dense SAM, then the others, model by model.

    Args:
        uri: MLflow tracking URI; nothing is created there.
        experiment: its name.
        group: only runs whose tag `group` has this value.

    Raises:
        UserError: the store cannot be read, has no such experiment, or the experiment has no finished run.
    """
    client, experiment_id = find_experiment(uri, experiment)
    query = "attributes.status = 'FINISHED'"
    if group is not None:
        query += f" and tags.`group` = '{_quoted(group)}'"
    runs = _all_runs(client, experiment_id, query)
    if not runs:
        raise UserError(_nothing_finished(client, experiment_id, experiment, group))
    groups = _grouped(runs)
    return [_row(each, groups) for each in sorted(groups, key=_order)]


def find_experiment(uri: str, name: str) -> tuple[Any, str]:
    """Client of the store and id of the experiment.

    Raises:
        UserError: the store cannot be read or has no such experiment; names the nearest one.
    """
    client = open_store(uri, create=False)
    try:
        found = client.get_experiment_by_name(name)
        names = [each.name for each in client.search_experiments()]
    except Exception as error:
        raise UserError(f"tracking.uri {without_secrets(uri)}: {one_line(error)}") from error
    if found is None or found.lifecycle_stage == "deleted":
        near = get_close_matches(name, names, n=1, cutoff=0.0)
        hint = f"; did you mean {near[0]!r}?" if near else "; it has none"
        raise UserError(f"no experiment {name!r} in {without_secrets(uri)}{hint}")
    try:
        follow_moved(found, uri, sqlite_path(uri))
    except UserError as error:
        _log.warning("%s", error)  # what is compared is in the store itself
    return client, str(found.experiment_id)


def _quoted(text: str) -> str:
    if "'" in text or "`" in text:
        raise UserError(f"group {text!r}: a group's name has no quotes")
    return text


def _all_runs(client: Any, experiment_id: str, query: str) -> list[Any]:
    runs: list[Any] = []
    token = None
    while True:
        page = client.search_runs([experiment_id], query, max_results=_PAGE, page_token=token)
        runs.extend(page)
        token = page.token
        if not token:
            return runs


def _nothing_finished(client: Any, experiment_id: str, experiment: str, group: str | None) -> str:
    where = f"experiment {experiment!r}" + (f", group {group!r}" if group else "")
    counts: dict[str, int] = defaultdict(int)
    for run in _all_runs(client, experiment_id, ""):
        counts[run.info.status] += 1
    others = ", ".join(f"{number} {status}" for status, number in sorted(counts.items()))
    return f"no finished run in {where}" + (f"; the experiment has {others}" if others else "; it is empty")


def _grouped(runs: Iterable[Any]) -> list[_Group]:
    by_key: dict[str, dict[str, Any]] = defaultdict(dict)
    for run in sorted(runs, key=lambda run: run.info.start_time):
        group = _Group(run.data.params, run.data.tags, [run])
        key = json.dumps([group.method, sorted(group.identity().items())])
        # Sorted by time: of runs with the same seed the latest replaces the others.
        by_key[key][run.data.params.get("train.seed", "")] = run
    groups = []
    for by_seed in by_key.values():
        pooled = list(by_seed.values())
        groups.append(_Group(pooled[-1].data.params, pooled[-1].data.tags, pooled))
    return groups


def _order(group: _Group) -> tuple[str, int, str, str]:
    rank = {"base": 0, "sam": 1}.get(group.method, 2)
    return (
        group.model,
        rank,
        group.method + group.mask,
        json.dumps(sorted(group.identity().items())),
    )


def _row(group: _Group, groups: list[_Group]) -> Row:
    top1, step = group.values("summary/top1"), group.mean("summary/step_time")
    probed = _probed(group, groups)
    ratios: dict[str, float | None] = {}
    notes = []
    for method, title in () if probed is not None else (("base", "the base optimizer alone"), ("sam", "dense SAM")):
        itself = group.method == method and (method != "sam" or group.ascends_densely)
        reference = group if itself else _nearest(group, groups, method)
        seconds = None if reference is None else reference.mean("summary/step_time")
        ratios[method] = step / seconds if step is not None and seconds else None
        if ratios[method] is None:
            if step is None:
                notes.append(f"{group.method}: no step time was recorded")
            else:
                notes.append(f"no finished run of {title} with {_timing_words(group)}")
    if probed is None:
        over_sam = ratios["sam"]
        probed = _Ratios(ratios["base"], None if over_sam is None else 1.0 - over_sam)
        if over_sam is not None and any(_probed(other, groups) for other in groups):
            notes.append("times of different runs, which other work on the machine shifts: no probes in it")
    return Row(
        method=group.method,
        model=group.model,
        backend=group.backend,
        mask=group.mask,
        settings=_settings(group, groups),
        density=_density(group),
        runs=len(group.runs),
        top1=fmean(top1) if top1 else None,
        top1_sd=stdev(top1) if len(top1) > 1 else None,
        step_seconds=step,
        time_over_base=probed.time_over_base,
        saving_over_sam=probed.saving,
        saving_interval=probed.interval,
        by_probes=probed.by_probes,
        notes=tuple(dict.fromkeys(notes)),
        run_ids=tuple(run.info.run_id for run in group.runs),
    )


@dataclass(frozen=True)
class _Ratios:
    """What a row costs and saves."""

    time_over_base: float | None
    saving: float | None
    interval: tuple[float, float] | None = None
    by_probes: bool = False


def _probed(group: _Group, groups: list[_Group]) -> _Ratios | None:
    """By the probes of the group's own runs, if all have some; the base optimizer's saving by those of dense SAM."""
    overhead, saving = (_of_every_run(group, f"summary/{name}_percent") for name in _PROBED)
    if group.method == "base":
        sam = _nearest(group, groups, "sam")
        dense = None if sam is None else _of_every_run(sam, f"summary/{_PROBED[0]}_percent")
        return None if dense is None else _Ratios(1.0, 1.0 - 1.0 / (1.0 + dense / 100.0), by_probes=True)
    if overhead is None or saving is None:
        return None
    low, high = (_of_every_run(group, f"summary/{_PROBED[1]}_percent_{bound}") for bound in ("low", "high"))
    unknown = low is None or high is None or low == high  # of dense SAM itself, which saves nothing for certain
    interval = None if unknown else (cast(float, low) / 100.0, cast(float, high) / 100.0)
    return _Ratios(1.0 + overhead / 100.0, saving / 100.0, interval, by_probes=True)


_PROBED = "overhead_vs_base", "saving_vs_dense"


def _of_every_run(group: _Group, metric: str) -> float | None:
    """The mean over the runs; None where one lacks it."""
    found = group.values(metric)
    return fmean(found) if len(found) == len(group.runs) else None


def _nearest(group: _Group, groups: list[_Group], method: str) -> _Group | None:
    """Of the groups that `group` can be timed against, the one most like it; of several, the latest."""

    def differences(other: _Group) -> int:
        mine, theirs = group.distinct(), other.distinct()
        keys = {key for key in mine.keys() | theirs.keys() if not key.startswith("perturbation")}
        return sum(mine.get(key) != theirs.get(key) for key in keys)

    same = [other for other in groups if other.method == method and other.timing() == group.timing()]
    if method == "sam":  # not one that ascends rarely, or by a part of each batch
        same = [other for other in same if other.ascends_densely]
    return min(same, key=lambda other: (differences(other), -other.latest), default=None)


def _timing_words(group: _Group) -> str:
    params, tags = group.params, group.tags
    return (
        f"{group.model}, batch {params.get('data.batch_size', '?')}, {params.get('data.resolution', '?')} px, "
        f"{params.get('train.precision', '?')}, {tags.get('backend', '?')} on {tags.get('world_size', '?')} process(es)"
        ", on this hardware"
    )


def _density(group: _Group) -> float | None:
    if group.method == "base":
        return None
    measured = group.mean("summary/density")
    if measured is not None:
        return measured
    if group.method == "sam":
        return 1.0
    sparsity = group.params.get("perturbation.mask.sparsity")
    final = group.params.get("perturbation.mask.sparsity_final", "null")
    return 1.0 - float(sparsity) if sparsity is not None and final == "null" else None


def _settings(group: _Group, groups: list[_Group]) -> str:
    alike = [
        other.identity()
        for other in groups
        if (other.method, other.model, other.mask) == (group.method, group.model, group.mask)
    ]
    keys = sorted({key for other in alike for key in other} - {"backend"})  # which has a column of its own
    differing = [key for key in keys if len({other.get(key) for other in alike}) > 1]
    mine = group.identity()
    return ", ".join(f"{key.rpartition('.')[2]} {mine.get(key, '—')}" for key in differing)

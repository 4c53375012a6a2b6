"""Runs of equal configuration but their seed, and which group another one is measured against."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from ssam_scale.tracking.compare.alike import DATA_PARAMS, all_have_digests, data_of
from ssam_scale.tracking.compare.runs import TrainedRun
from ssam_scale.tracking.dense import is_dense_sam
from ssam_scale.tracking.describe import mask_words
from ssam_scale.tracking.identity import WHERE, distinct

# What makes perturbations of different methods comparable.
_RADIUS = tuple(f"perturbation.{key}" for key in ("rho", "rho_schedule", "rho_final", "adaptive"))

_CHANGED = "changed."  # and a parameter: the tag of a run that was resumed with another value of it

# A ratio of times means something only where all of these are the same.
_TIME_PARAMS = (
    "model.name",
    "data.batch_size",
    "data.resolution",
    *(f"data.progressive.{key}" for key in ("resolution", "from_epoch", "to_epoch")),
    "train.precision",
    "train.accumulation",
    "train.activation_checkpointing",
    "train.compile",
)


@dataclass(frozen=True)
class Group:
    """The runs of one row, the latest of each seed.

    Attributes:
        runs: in the order of time; either all of them go on, or none.
        data: what they were trained and evaluated on, as far as it tells them from others.
    """

    runs: tuple[TrainedRun, ...]
    data: tuple[tuple[str, str], ...]

    @property
    def params(self) -> dict[str, str]:
        """Of the latest run."""
        return dict(self.runs[-1].params)

    @property
    def tags(self) -> dict[str, str]:
        """Of the latest run."""
        return dict(self.runs[-1].tags)

    @property
    def method(self) -> str:
        """Of all runs."""
        return self.tags["method"]

    @property
    def model(self) -> str:
        """Of all runs."""
        return self.params.get("model.name", "unknown")

    @property
    def backend(self) -> str:
        """Of all runs."""
        return self.tags.get("backend", "unknown")

    @property
    def mask(self) -> str:
        """In words."""
        return mask_words(self.method, self.params)

    @property
    def running(self) -> bool:
        """Whether the runs go on."""
        return self.runs[-1].running

    @property
    def gpus(self) -> int:
        """That each run computes on: one for each process, or none."""
        return 0 if self.tags.get("gpus", "none") == "none" else int(self.tags.get("world_size", "1"))

    def is_reference(self, method: str) -> bool:
        """Whether it is what others are measured against: `base`, or `sam`, which is dense in every step."""
        return self.method == method and (method != "sam" or is_dense_sam(self.params))

    def distinct(self) -> dict[str, str]:
        """What makes this group what it is: parameters, those that were changed on the way too, and data."""
        by_path = DATA_PARAMS[0] in dict(self.data)
        changed = {
            tag.removeprefix(_CHANGED): f"{self.params.get(tag.removeprefix(_CHANGED), '—')}, later {value}"
            for tag, value in self.tags.items()
            if tag.startswith(_CHANGED)
        }
        own = distinct(self.params | changed)
        return {k: v for k, v in own.items() if by_path or not k.startswith(DATA_PARAMS)} | dict(self.data)

    def identity(self) -> dict[str, str]:
        """All that makes it a row of its own: that, and where it ran."""
        return self.distinct() | {key: self.tags.get(key, "—") for key in WHERE}

    def values(self, metric: str) -> list[float]:
        """Of each run that has it."""
        return [value for run in self.runs if (value := run.metric(metric)) is not None]

    def mean(self, metric: str) -> float | None:
        """Over the runs that have it; None if none has."""
        found = self.values(metric)
        return fmean(found) if found else None

    def mean_of_all(self, metric: str) -> float | None:
        """Over the runs; None where one lacks it."""
        found = self.values(metric)
        return fmean(found) if len(found) == len(self.runs) else None

    def times_like(self, other: Group) -> bool:
        """Whether a ratio of step times means something."""
        return self._timing() == other._timing()

    def timing_words(self) -> str:
        """What that takes."""
        params, tags = self.params, self.tags
        return (
            f"{self.model}, batch {params.get('data.batch_size', '?')}, {params.get('data.resolution', '?')} px, "
            f"{params.get('train.precision', '?')}, {tags.get('backend', '?')} on {tags.get('world_size', '?')} "
            "process(es), on this hardware"
        )

    def differing_from(self, other: Group) -> list[str]:
        """Parameters that are not the same, but those of the perturbation; of two perturbations, its radius too."""
        mine, theirs = self.distinct(), other.distinct()
        keys = sorted(key for key in mine.keys() | theirs.keys() if not key.startswith("perturbation"))
        if "base" not in (self.method, other.method):
            keys += _RADIUS
        return [key for key in keys if mine.get(key) != theirs.get(key)]

    def _timing(self) -> tuple[str, ...]:
        return (
            *(self.params.get(key, "") for key in _TIME_PARAMS),
            *(self.tags.get(key, "") for key in WHERE),
        )


def grouped(runs: Sequence[TrainedRun]) -> list[Group]:
    """The groups of runs, which are in the order of time: base first, then dense SAM, then the others, model by model.

    Of several runs of a seed the latest counts. Runs that go on are groups of their own.
    """
    by_digest = all_have_digests(runs)
    by_key: dict[str, dict[str, Group]] = defaultdict(dict)
    for run in runs:
        alone = Group((run,), tuple(sorted(data_of(run, by_digest=by_digest).items())))
        key = json.dumps([alone.method, run.running, sorted(alone.identity().items())])
        by_key[key].pop(run.seed, None)
        by_key[key][run.seed] = alone
    groups = [
        Group(tuple(each.runs[0] for each in by_seed.values()), next(iter(by_seed.values())).data)
        for by_seed in by_key.values()
    ]
    return sorted(groups, key=_order)


def _order(group: Group) -> tuple[str, int, str, str, bool]:
    rank = {"base": 0, "sam": 1}.get(group.method, 2)
    identity = json.dumps(sorted(group.identity().items()))
    return group.model, rank, group.method + group.mask, identity, group.running


def timed_against(group: Group, groups: Sequence[Group], method: str) -> Group | None:
    """The group of `method` that another one's step times are compared with, if there is one: the one most like it.

    Args:
        group: which is compared.
        groups: all of them.
        method: `base` or `sam`.
    """
    if group.is_reference(method):
        return group
    return _most_alike(group, [each for each in _references(groups, method) if each.times_like(group)])


def judged_against(group: Group, groups: Sequence[Group], method: str) -> Group | None:
    """The group of `method` that another one's accuracy is compared with: of the same model and data.

    Args:
        group: which is compared.
        groups: all of them.
        method: `base` or `sam`.
    """
    return _most_alike(
        group, [each for each in _references(groups, method) if (each.model, each.data) == (group.model, group.data)]
    )


def _references(groups: Sequence[Group], method: str) -> list[Group]:
    return [each for each in groups if each.is_reference(method) and not each.running]


def _most_alike(group: Group, found: Sequence[Group]) -> Group | None:
    """Of several that are equally alike one whose times mean something, or else the latest."""

    def unlike(other: Group) -> tuple[int, bool, int]:
        return len(group.differing_from(other)), not other.times_like(group), -other.runs[-1].started

    return min(found, key=unlike, default=None)


def settings(group: Group, groups: Sequence[Group]) -> str:
    """What tells a group from others of the same method, mask and model, but for the backend; empty if nothing does."""
    alike = [
        each.identity()
        for each in groups
        if (each.method, each.model, each.mask) == (group.method, group.model, group.mask)
    ]
    keys = sorted({key for each in alike for key in each} - {"backend"})  # which has a column of its own
    differing = [key for key in keys if len({each.get(key) for each in alike}) > 1]
    mine = group.identity()
    return ", ".join(f"{key.rpartition('.')[2]} {mine.get(key, '—')}" for key in differing)

"""Whether runs may be compared: on the same hardware, of the same data, by the same software."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Literal, get_args

from ssam_scale.errors import UserError
from ssam_scale.tracking.compare.runs import TrainedRun

Aspect = Literal["hardware", "data", "software"]
ASPECTS: tuple[Aspect, ...] = get_args(Aspect)

DATA_PARAMS = ("data.train", "data.val")

_SOFTWARE = {
    "ssam_scale": "version/ssam_scale",
    "commit": "git_commit",
    "torch": "version/torch",
    "CUDA": "version/cuda",
    "DeepSpeed": "version/deepspeed",
}
_SHOWN_RUNS = 2
_SHOWN_VALUES = 3
_HASH_LENGTH = 12  # characters of a commit or digest that people read

Differences = dict[Aspect, dict[str, dict[str, list[TrainedRun]]]]


def facts(run: TrainedRun, aspect: Aspect, *, by_digest: bool) -> dict[str, str]:
    """What is known of a run in one aspect; what it does not say (an older version's) is left out.

    Args:
        run: one of those that are compared.
        aspect: which.
        by_digest: know data by the digests that were logged, wherever the files lie; else by the files' paths.
    """
    if aspect == "hardware":
        return {"hardware": run.tags["hardware"]} if "hardware" in run.tags else {}
    if aspect == "data":
        return data_of(run, by_digest=by_digest)
    found = {name: run.tags[tag] for name, tag in _SOFTWARE.items() if tag in run.tags}
    if not run.tags.get("backend", "").startswith("zero"):
        found.pop("DeepSpeed", None)  # nothing of it runs
    if "commit" in found:
        dirty = run.tags.get("git_dirty") == "true"
        found["commit"] = found["commit"][:_HASH_LENGTH] + (" with changes" if dirty else "")
    return found


def data_of(run: TrainedRun, *, by_digest: bool) -> dict[str, str]:
    """The data of a run: digest by what it is for, or path by parameter."""
    if by_digest:
        return {f"{context} data": digest[:_HASH_LENGTH] for context, digest in run.datasets.items()}
    return {key: run.params[key] for key in DATA_PARAMS if key in run.params}


def all_have_digests(runs: Sequence[TrainedRun]) -> bool:
    """Whether data can be known by digests, as it can if each run has logged some."""
    return all(run.datasets for run in runs)


def differences(runs: Sequence[TrainedRun]) -> Differences:
    """What differs among runs, by aspect: each fact's values, and the runs that have them."""
    by_digest = all_have_digests(runs)
    result: Differences = {}
    for aspect in ASPECTS:
        values: dict[str, dict[str, list[TrainedRun]]] = {}
        for run in runs:
            for fact, value in facts(run, aspect, by_digest=by_digest).items():
                values.setdefault(fact, {}).setdefault(value, []).append(run)
        differing = {fact: found for fact, found in values.items() if len(found) > 1}
        if differing:
            result[aspect] = differing
    return result


def check_alike(found: Differences, runs: Sequence[TrainedRun], allowed: Collection[str], group: str | None) -> None:
    """Refuse to compare runs that differ in what they ran on, of or by, unless that is allowed.

    Args:
        found: what differs.
        runs: all of them.
        allowed: aspects in which they may.
        group: that was asked for.

    Raises:
        UserError: says which runs differ in what, and what would work.
    """
    refused = {aspect: values for aspect, values in found.items() if aspect not in allowed}
    if not refused:
        return
    listed = "; ".join(
        f"{aspect}: {', '.join(_fact(fact, of_fact) for fact, of_fact in values.items())}"
        for aspect, values in refused.items()
    )
    groups = sorted({run.tags["group"] for run in runs if "group" in run.tags})
    if group is not None:
        way_out = ""
    elif groups:
        way_out = f"--group takes one of {', '.join(groups)}; or "
    else:
        way_out = "--group takes runs that were trained with tracking.group=NAME; or "
    raise UserError(
        f"these runs are not comparable, they differ in {listed}; {way_out}compare them nevertheless: "
        f"--allow-different {','.join(refused)}"
    )


def in_words(found: Differences) -> list[str]:
    """A line for each aspect in which runs differ."""
    return [
        f"different {aspect}: " + "; ".join(f"{fact} {' | '.join(values)}" for fact, values in of_aspect.items())
        for aspect, of_aspect in found.items()
    ]


def _fact(fact: str, values: Mapping[str, Sequence[TrainedRun]]) -> str:
    shown = [f"{value} ({_names(runs)})" for value, runs in list(values.items())[:_SHOWN_VALUES]]
    more = len(values) - len(shown)
    name = "" if fact == "hardware" else f"{fact} "
    return name + " against ".join(shown) + (f" and {more} more" if more else "")


def _names(runs: Sequence[TrainedRun]) -> str:
    names = [f"{run.name or 'run'} {run.id[:8]}" for run in runs[:_SHOWN_RUNS]]
    more = len(runs) - len(names)
    return ", ".join(names) + (f" and {more} more" if more else "")

"""Runs in words: what one perturbs, and its story for the run's page."""

from __future__ import annotations

import json
from collections.abc import Mapping


def _range(cut: str) -> str:
    low, high = json.loads(cut)
    return f"{low:g}" if low == high else f"{low:g}–{high:g}"


def mask_words(method: str, params: Mapping[str, str]) -> str:
    """What a run perturbs, e.g. `depth rotate 0.25–0.75`; empty where nothing is perturbed.

    Args:
        method: the run's.
        params: its parameters, as MLflow has them.
    """
    if _perturbs_nothing(method, params):
        return ""
    prefix = "perturbation.mask."
    mask = {key[len(prefix) :]: value for key, value in params.items() if key.startswith(prefix)}
    if "pattern" not in mask:
        return "dense"
    words = [f"{mask['n']}:{mask['m']}" if "n" in mask else mask["pattern"]]
    if "dynamic.drop" in mask:
        words = ["dynamic", f"{mask['dynamic.drop']}/{mask['dynamic.grow']}"]
    elif "score" in mask:
        words.append(("sampled " if mask.get("labels") == "sampled" else "") + mask["score"])
    words += [mask[key] for key in ("policy",) if key in mask]
    words += [mask[key] for key in ("allocation",) if mask.get(key, "global") != "global"]
    if "cut" in mask:
        words.append(_range(mask["cut"]))
    if mask.get("draw") == "annealed":
        words.append(f"to {_range(mask['cut_final'])}")
    elif mask.get("draw") == "cost":
        words.append("by cost")
    if mask.get("draw", "cost") == "cost" and mask.get("refresh_epochs") == mask.get("refresh_steps") == "null":
        words.append("chosen once")
    if "parameters" in mask:
        words += json.loads(mask["parameters"])
    return " ".join(words)


def _perturbs_nothing(method: str, params: Mapping[str, str]) -> bool:
    return method == "base" or params.get("perturbation") == "null"


def plan_words(method: str, params: Mapping[str, str]) -> str:
    """When and by what a run climbs, e.g. `one step in 2, by 50% of the batch`; empty where it does not.

    Args:
        method: the run's.
        params: its parameters, as MLflow has them.
    """
    if _perturbs_nothing(method, params):
        return ""
    section = {key.removeprefix("perturbation."): value for key, value in params.items()}
    interval = int(section.get("interval", "1"))
    fraction = float(section.get("direction.fraction", section.get("fraction", "1.0")))
    source, scope = section.get("direction.source", "fresh"), section.get("direction.scope", "global")
    first, last = json.loads(section.get("window", "[0.0, 1.0]"))
    words = ["every step" if interval == 1 else f"one step in {interval}"]
    if (first, last) != (0.0, 1.0):
        words.append(f"from {100 * first:g}% to {100 * last:g}% of the run")
    if source != "fresh":
        words.append(f"along {_SOURCES.get(source, source)}")
    if fraction != 1.0:
        which = section.get("direction.choose", "first")
        words.append(f"by {100 * fraction:g}% of the batch" + ("" if which == "first" else f" ({_words(which)})"))
    if scope != "global":
        words.append(f"of each {_words(scope)}")
    elif section.get("savings.within_shard_group") == "true":  # as it was called before
        words.append("of each shard group")
    if float(section.get("reuse", "0.0")):
        words.append(f"reused by {float(section['reuse']):g} between")
    if "descent.fraction" in section:
        share, which = 100 * float(section["descent.fraction"]), _words(section["descent.choose"])
        words.append(f"descending by {share:g}% of the batch ({which})")
    if section.get("loss_budget", "null") != "null":
        words.append(f"at most as far as the loss rises by {float(section['loss_budget']):g}")
    if "gate.delta" in section:
        words.append("where the gradient is long")
    if float(section.get("gap", "0.0")):
        words.append(f"gap narrowed by {float(section['gap']):g}")
    if section.get("adaptive") == "true":
        words.append("adaptive")
    return ", ".join(words)


_SOURCES = {
    "momentum": "the momentum",
    "previous": "the gradient before",
    "friendly": "the gradient less its mean",
    "vasso": "the mean gradient",
}


def _words(name: str) -> str:
    return name.replace("_", " ")


def story(params: Mapping[str, str], tags: Mapping[str, str], summary: Mapping[str, float]) -> str:
    """What a finished run was and brought, in Markdown, for the head of its page in MLflow.

    Args:
        params: of the run.
        tags: of the run: `method`, `mask`, `backend`, `world_size`, `hardware`, `command`.
        summary: its metrics `summary/…`.
    """
    what = f"**{tags['method']}**" + (f" ({tags['mask']})" if tags.get("mask") else "")
    count = int(tags["world_size"])
    where = f"{tags['backend']} on {count} process{'es' if count > 1 else ''}, {tags['hardware']}"
    epochs, steps = params["train.epochs"], params.get("train.max_steps")
    length = f"{steps} steps" if epochs == "null" else f"{epochs} epochs"
    lines = [f"{what}: {params['model.name']}, {length}, {where}."]
    if "summary/top1" in summary:
        best = (
            f" (best {summary['summary/best_top1']:.2f}%)"
            if summary["summary/best_top1"] > summary["summary/top1"]
            else ""
        )
        lines.append(f"Top-1 **{summary['summary/top1']:.2f}%**{best}.")
    if "summary/step_time" in summary:
        step = f"A step takes {1000 * summary['summary/step_time']:.1f} ms"
        overhead = summary.get("summary/overhead_vs_base_percent")
        if overhead is not None and tags["method"] != "base":
            step += f", {1.0 + overhead / 100.0:.2f} times the base optimizer's"
        lines.append(f"{step}.")
    saving = summary.get("summary/saving_vs_dense_percent")
    if saving is not None and tags["method"] != "base" and saving:
        bounds = [summary.get(f"summary/saving_vs_dense_percent_{bound}") for bound in ("low", "high")]
        known = [bound if saving >= 0 else -bound for bound in bounds if bound is not None]
        between = f" (95% interval {min(known):.0f} to {max(known):.0f}%)".replace("-", "−") if len(known) == 2 else ""
        seconds = summary["summary/saving_seconds_so_far"]
        lines.append(
            f"**{abs(saving):.0f}% {'less' if saving >= 0 else 'more'} time than dense SAM**{between}: "
            f"{abs(seconds):,.0f} s {'saved' if seconds >= 0 else 'lost'}."
        )
    if "command" in tags:
        lines.append(f"\n\n`{tags['command']}`")  # not a block, which would make the page as wide as the line
    return " ".join(lines)

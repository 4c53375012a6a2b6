"""Named methods: each is a point of the space that `perturbation` spans, and `perturbation.preset` expands into it.

Only data, so that a configuration can be read without anything else. A method that is a loss term is no point of this
space: it is settings of the section `trajectory` (`TERMS`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Preset:
    """A method of the literature, or one of ours, as settings of the section `perturbation`.

    Attributes:
        summary: what it is, in one line.
        point: the settings that make it what it is; others than these contradict it.
        start: settings that it leaves to be tuned, and where its authors, or we, begin.
        cost: time of a step over the base optimizer's, by arithmetic; t is the suffix's share of compute, of a cut.
        paper: where it comes from; empty: it is ours.
        refuses: what it does not go with, beside what every ascent refuses; empty: nothing.
        off: settings that would switch off what makes it this method, and so cannot be given.
    """

    summary: str
    point: Mapping[str, Any]
    start: Mapping[str, Any]
    cost: str
    paper: str = ""
    refuses: str = ""
    off: Mapping[str, Any] = field(default_factory=dict)


_PLAIN = {
    "direction": {"source": "fresh", "fraction": 1.0, "scope": "global"},
    "interval": 1,
    "window": [0.0, 1.0],
    "gap": 0.0,
    "gate": None,
    "descent": None,
    "loss_budget": None,
}
_FISHER = {"pattern": "element", "score": "fisher"}

PRESETS: Mapping[str, Preset] = {
    "sam": Preset(
        "the gradient of the batch, all weights",
        {**_PLAIN, "mask": None, "adaptive": False},
        {"rho": 0.05},
        "2",
        "arXiv 2010.01412",
    ),
    "asam": Preset(
        "SAM, each weight in proportion to its magnitude",
        {**_PLAIN, "mask": None, "adaptive": True},
        {"rho": 0.5},
        "2",
        "arXiv 2102.11600",
        "reuse; gap",
    ),
    "worker-sam": Preset(
        "SAM of each worker's own part of the batch, as its authors train on several accelerators",
        {"direction": {"source": "fresh", "scope": "worker"}, "mask": None},
        {"rho": 0.05},
        "2, sends nothing in the ascent",
        "arXiv 2010.01412, section 3.1",
        "backends fsdp2 and zero3; reuse, gap and gate",
    ),
    "ssam-f": Preset(
        "single weights of the highest Fisher score",
        {"direction": {"source": "fresh"}, "mask": _FISHER, "norm": "dense"},
        {"rho": 0.1, "mask": {"sparsity": 0.5, "samples": 128}},
        "2",
        "arXiv 2210.05177",
    ),
    "ssam-d": Preset(
        "single weights, some dropped and others grown at each refresh",
        {"direction": {"source": "fresh"}, "mask": {"pattern": "element", "dynamic": {}}, "norm": "dense"},
        {"rho": 0.1, "mask": {"sparsity": 0.5}},
        "2",
        "arXiv 2210.05177",
    ),
    "sam-on": Preset(
        "the normalization layers alone",
        {"direction": {"source": "fresh"}, "mask": {"pattern": "norm"}},
        {"rho": 0.5},
        "5/3 to 2",
        "arXiv 2306.04226",
    ),
    "looksam": Preset(
        "an ascent in every k-th step, reused in the steps between",
        {"direction": {"source": "fresh"}},
        {"rho": 0.1, "interval": 5, "reuse": 0.7},
        "1 + 1/interval",
        "arXiv 2203.02714",
        "adaptive; gate; parts of the batch; other directions and scopes",
        {"reuse": 0.0, "interval": 1},
    ),
    "gsam": Preset(
        "SAM that also narrows the gap between the losses at w + ε and at w; the radius falls with the learning rate",
        {"direction": {"source": "fresh", "scope": "global"}, "adaptive": False, "rho_schedule": "lr"},
        {"rho": 0.6, "rho_final": 0.16666666666666666, "gap": 0.6},
        "2",
        "arXiv 2203.08065",
        "adaptive; parts of the batch; other directions and scopes",
        {"gap": 0.0},
    ),
    "ae-sam": Preset(
        "an ascent only where the gradient is unusually long",
        {"direction": {"source": "fresh", "fraction": 1.0, "scope": "global"}},
        {"rho": 0.1, "gate": {"delta": 0.9, "first": 1.0, "last": -1.0}},
        "1 + the share of open steps, about 1.5",
        "arXiv 2304.14647",
        "parts of the batch; other directions and scopes; reuse; `with opt.perturbed()`",
        {"gate": None},
    ),
    "esam": Preset(
        "single tensors, others in each step, and a descent by the samples whose loss rises most",
        {
            "direction": {"source": "fresh", "fraction": 1.0},
            "mask": {"pattern": "tensor", "score": "random", "independent": True, "refresh_steps": 1},
            "descent": {"choose": "sharpest"},
        },
        {"rho": 0.1, "mask": {"sparsity": 0.4}, "descent": {"fraction": 0.5}},
        "4/3 + descent.fraction, less what the mask elides: about 1.7",
        "arXiv 2110.03141",
        "parts of the batch in the ascent; momentum and previous; reuse, gap and gate; `with opt.perturbed()`",
        {"descent": None},
    ),
    "k-sam": Preset(
        "both passes by the samples of the highest loss",
        {
            "direction": {"source": "fresh", "choose": "highest_loss"},
            "mask": None,
            "descent": {"choose": "highest_loss"},
        },
        {"rho": 0.1, "direction": {"fraction": 0.5}, "descent": {"fraction": 0.5}},
        "1/3 + direction.fraction + descent.fraction",
        "arXiv 2210.12864",
        "momentum and previous; reuse, gap and gate; `with opt.perturbed()`",
        {"descent": None},
    ),
    "le-sam": Preset(
        "as far as the loss rises by the same everywhere, to first order; the rise falls along a cosine",
        {"direction": {"source": "fresh"}, "norm": "masked", "rho_schedule": "cosine"},
        {"rho": 0.5, "loss_budget": 0.1},
        "2",
        "arXiv 2605.10183",
        "norms dense and calibrated; other directions",
        {"loss_budget": None},
    ),
    "rare-sam": Preset(
        "an ascent in every tenth step, at ten times the radius",
        {"direction": {"source": "fresh"}},
        {"rho": 0.5, "interval": 10},
        "1 + 1/interval",
        "MosaicML Composer",
        off={"interval": 1},
    ),
    "f-sam": Preset(
        "the gradient less the running mean of earlier ones",
        {"direction": {"source": "friendly"}, "norm": "masked"},
        {"rho": 0.2, "direction": {"sigma": 1.0, "lmbda": 0.9}},
        "2",
        "arXiv 2403.12350",
        "norms dense and calibrated; reuse, gap and gate",
    ),
    "vasso": Preset(
        "the running mean of gradients",
        {"direction": {"source": "vasso"}, "norm": "masked"},
        {"rho": 0.1, "direction": {"theta": 0.9}},
        "2",
        "arXiv 2309.15639",
        "norms dense and calibrated; reuse, gap and gate",
    ),
    "msam": Preset(
        "further along the momentum of the base optimizer",
        {"direction": {"source": "momentum"}},
        {"rho": 3.0},
        "1",
        "arXiv 2401.12033",
        "optimizers without momentum; norm calibrated; reuse, gap and gate",
    ),
    "s2-sam": Preset(
        "the gradient by which the step before descended",
        {"direction": {"source": "previous"}, "norm": "masked"},
        {"rho": 0.05},
        "1",
        "openreview MJgMMqMDu4",
        "norms dense and calibrated; reuse, gap and gate",
    ),
    "moving-cut": Preset(
        "the blocks from a random depth on; those before run once for both passes",
        {"mask": {"pattern": "depth", "policy": "rotate"}},
        {"rho": 0.2},
        "1 + t, on average 1.5",
        "",
        "norm dense; models that are not in stages",
    ),
    "small-ascent": Preset(
        "SAM by an eighth of the batch",
        {"direction": {"source": "fresh"}, "mask": None},
        {"rho": 0.1, "direction": {"fraction": 0.125}},
        "1 + fraction",
    ),
    "late-sam": Preset(
        "SAM in the last part of the run",
        {"direction": {"source": "fresh"}, "mask": None},
        {"rho": 0.05, "window": [0.75, 1.0]},
        "1 + the window's length",
        "arXiv 2410.10373",
        off={"window": [0.0, 1.0]},
    ),
}

TERMS: Mapping[str, Preset] = {
    "saf": Preset(
        "the base optimizer, with a loss term by each image's own outputs of some epochs ago",
        {"kind": "saf"},
        {"weight": 0.3, "temperature": 5.0, "lag_epochs": 3, "start_epoch": 5},
        "1, and 2 bytes an image, class and epoch kept",
        "arXiv 2205.14083",
        "loss.mixup and loss.cutmix; orders that repeat an image within an epoch",
    ),
    "mesa": Preset(
        "the base optimizer, with a loss term by the outputs of averaged weights",
        {"kind": "mesa"},
        {"weight": 0.8, "temperature": 5.0, "decay": 0.9995, "start_epoch": 5},
        "4/3, a forward more",
        "arXiv 2205.14083",
    ),
}
"""Methods that are a loss term: settings of the section `trajectory`, where a `Preset` of `PRESETS` has those of the
section `perturbation`. They are meant to go without a perturbation, and go with any."""


class ContradictionError(ValueError):
    """A setting that a preset does not have.

    Attributes:
        path: of the setting, in the configuration.
    """

    def __init__(self, text: str, path: tuple[str, ...]) -> None:
        super().__init__(text)
        self.path = path


def expanded(given: Mapping[str, Any]) -> dict[str, Any]:
    """A section `perturbation` with the settings of the preset that it names; what it says itself is kept.

    Raises:
        ContradictionError: something is said that the preset is not.
    """
    preset, name = PRESETS[given["preset"]], given["preset"]
    for key, off in preset.off.items():
        if key in given and given[key] == off:
            raise ContradictionError(
                f"perturbation.preset {name} is nothing of the kind with {key}: {_shown(off)}; leave that out, or "
                "leave the preset out and say what you want",
                ("perturbation", key),
            )
    return _filled(_merged(given, preset.point, given["preset"], ()), preset.start)


def _merged(given: Any, point: Mapping[str, Any], name: str, path: tuple[str, ...]) -> dict[str, Any]:
    result = dict(given)
    for key, needed in point.items():
        there = result.get(key, needed)
        if isinstance(needed, Mapping) and isinstance(there, Mapping):
            result[key] = _merged(there, needed, name, (*path, key))
        elif there == needed:
            result[key] = needed
        else:
            raise ContradictionError(
                f"perturbation.preset {name} has {'.'.join((*path, key))}: {_shown(needed)}, and it is given as "
                f"{_shown(there)}: leave that out, or leave the preset out and say what you want",
                ("perturbation", *path, key),
            )
    return result


def _filled(given: Mapping[str, Any], start: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(given)
    for key, value in start.items():
        if isinstance(value, Mapping) and isinstance(result.get(key), Mapping):
            result[key] = _filled(result[key], value)
        else:
            result.setdefault(key, value)
    return result


def _shown(value: Any) -> str:
    """As a configuration has it."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_shown(each)}" for key, each in value.items()) + "}"
    return json.dumps(value).strip('"')


def _overrides(settings: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _overrides(value, f"{prefix}{key}.")
        elif (prefix + key, value) not in _USUAL:
            yield f"{prefix}{key}={_shown(value)}"


_USUAL = (
    *(("direction.source", "fresh"), ("direction.fraction", 1.0), ("direction.scope", "global"), ("norm", "masked")),
    *(("mask", None), ("adaptive", False), ("interval", 1), ("window", [0.0, 1.0]), ("gap", 0.0), ("gate", None)),
    *(("descent", None), ("loss_budget", None)),
)


def in_words(preset: Preset, prefix: str = "") -> str:
    """What of a preset's settings is not as usual, e.g. `direction.source=momentum, rho=3.0`.

    Args:
        preset: the method.
        prefix: put before each key.
    """
    return ", ".join(_overrides(_filled(preset.point, preset.start), prefix))

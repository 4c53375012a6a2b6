"""Writes `docs/recipes.md`: the recipes in `configs/recipes`, key by key, and what departs from their sources.

python docs/write_recipes.py
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

OUT = Path(__file__).with_name("recipes.md")
FOLDER = Path(__file__).parents[1] / "configs" / "recipes"
INTRODUCTION = """\
# Recipes as they were published

Written by `python docs/write_recipes.py` from the files in [`configs/recipes`](../configs/recipes): change them there.

Each trains ImageNet-1K as its source says, with the base optimizer: `ssam-scale train --config
configs/recipes/deit_s.yaml`. `perturbation={preset: sam}` adds dense SAM, `'perturbation={rho: 0.1, mask: {pattern:
depth}}'` SSAM with a moving cut; the radius is to be found by a sweep. None was trained to its end here. The second
table has what departs from a source. Of all of them it holds that crops, flips, mixing and what else is drawn at
random are drawn by image or step, and that mixup and CutMix mix neighbours in a batch with one factor a step, the same
for any number of processes, where timm and DeiT mix each process's batch with itself reversed.

`configs/convnext_t.yaml` has ConvNeXt-T's recipe, `configs/vit_b.yaml` that of ViT-B/16 with SAM and without
augmentation, `configs/resnet50.yaml` the sparse SAM papers', each with a perturbation; `configs/finetune_vit.yaml`
[fine-tunes](training.md#training-a-part-and-parts-differently).
"""


def files() -> list[Path]:
    """The recipes, in the order of their names."""
    return sorted(FOLDER.glob("*.yaml"))


def keys(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of a file, dotted, and its value; lists of sections in one."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from keys(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


_LEFT_OUT = ("data.train", "data.val", "perturbation", "checkpoint.directory", "tracking.experiment", "train.seed")


def shown(value: Any) -> str:
    """A value in a cell."""
    if isinstance(value, list):
        return "; ".join(", ".join(f"{k} {v}" for k, v in each.items()) for each in value).replace("|", r"\|")
    return str(value).lower() if isinstance(value, bool) else str(value)


def table() -> Iterator[str]:
    """What each file says, a key a row; — where the default counts."""
    said = {path.stem: dict(keys(yaml.safe_load(path.read_text(encoding="utf-8")))) for path in files()}
    rows = dict.fromkeys(key for of_file in said.values() for key in of_file if key not in _LEFT_OUT)
    sections = list(dict.fromkeys(key.split(".")[0] for key in rows))
    yield "| key | " + " | ".join(f"[{name}](../configs/recipes/{name}.yaml)" for name in said) + " |"
    yield "|---" * (len(said) + 1) + "|"
    for key in sorted(rows, key=lambda key: sections.index(key.split(".")[0])):
        cells = (shown(of_file[key]) if key in of_file else "—" for of_file in said.values())
        yield f"| `{key}` | " + " | ".join(cells) + " |"
    yield ""


def departures() -> Iterator[str]:
    """Lines of files whose comments say that they depart, or are ours."""
    yield "| recipe | source | key | what departs |"
    yield "|---|---|---|---|"
    for path in files():
        text = path.read_text(encoding="utf-8")
        source = (
            re.sub(r"\s*\n# ", " ", text.partition("\n#\n")[0])
            .removeprefix("# ")
            .removesuffix(" What departs from it says so.")
        )
        section, first = "", True
        for line in text.splitlines():
            section = found[1] if (found := re.match(r"(\w+):", line)) else section
            if said := re.match(r" +(\w+):.*?# ((?:.*departs|ours|likewise).*)$", line):
                whose = f"{path.stem} | {source}" if first else " | "
                yield f"| {whose} | `{section}.{said[1]}` | {said[2]} |"
                first = False
    yield ""


def page() -> str:
    """The whole page."""
    return "\n".join([INTRODUCTION, *table(), *departures()]).rstrip() + "\n"


if __name__ == "__main__":
    OUT.write_text(page(), encoding="utf-8")

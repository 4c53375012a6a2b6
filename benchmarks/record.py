"""A benchmark's result on disk: the table for people and, beside it, the raw rows and what they were measured on."""

from __future__ import annotations

import datetime
import json
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ssam_scale.tracking.environment import git_tags, hardware_tags, versions

RESULTS = Path(__file__).parent / "results"


def result_path(what: str) -> Path:
    """`results/[what]_[hardware]_[date].md` of this machine and day."""
    hardware = re.sub(r"[^a-z0-9]+", "-", hardware_tags()["hardware"].lower()).strip("-")
    return RESULTS / f"{what}_{hardware}_{datetime.datetime.now(datetime.timezone.utc).date()}.md"


def provenance(script: str) -> dict[str, str]:
    """`command`, `commit`, `versions` and `hardware` of this run, as a table's last lines and its JSON say them."""
    git, found = git_tags(), versions()
    dirty = " with changes" if git.get("git_dirty") == "true" else ""
    return {
        "command": shlex.join(["python", f"benchmarks/{script}", *sys.argv[1:]]),
        "commit": git.get("git_commit", "unknown") + dirty,
        "versions": f"Python {found['python']}, torch {found['torch']}, timm {found['timm']}",
        "hardware": hardware_tags()["hardware"],
    }


def write(output: Path, text: Sequence[str], rows: Sequence[Mapping[str, Any]], made: Mapping[str, str]) -> None:
    """Write the Markdown file `output`, ending with where it comes from, and a `.json` of the raw rows beside it."""
    output.parent.mkdir(parents=True, exist_ok=True)
    lines = [*text, "", *(f"- {key}: {f'`{value}`' if key == 'command' else value}" for key, value in made.items())]
    output.write_text("\n".join(lines) + "\n")
    output.with_suffix(".json").write_text(json.dumps({**made, "rows": list(rows)}, indent=1) + "\n")

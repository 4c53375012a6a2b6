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


def result_path(folder: Path, what: str) -> Path:
    """`[what]_[hardware]_[date].md` of this machine and day (UTC), in `folder`."""
    hardware = re.sub(r"[^a-z0-9]+", "-", hardware_tags()["hardware"].lower()).strip("-")
    return folder / f"{what}_{hardware}_{datetime.datetime.now(datetime.timezone.utc).date()}.md"


def provenance(command: Sequence[str] | None = None) -> dict[str, str]:
    """`command` (this process's, unless given), `commit`, `versions` and `hardware` of a result."""
    git, found = git_tags(), versions()
    dirty = " with changes" if git.get("git_dirty") == "true" else ""
    program = Path(sys.argv[0])
    here = ["python", f"benchmarks/{program.name}"] if program.suffix == ".py" else [program.name]
    if program.name == "__main__.py":  # python -m ssam_scale
        here = ["ssam-scale"]
    named = ", ".join(f"{name} {found[name]}" for name in ("torch", "timm", "deepspeed") if name in found)
    return {
        "command": shlex.join(command or [*here, *sys.argv[1:]]),
        "commit": git.get("git_commit", "unknown") + dirty,
        "versions": f"Python {found['python']}, {named}",
        "hardware": hardware_tags()["hardware"],
    }


def write(output: Path, text: Sequence[str], rows: Sequence[Mapping[str, Any]], made: Mapping[str, str]) -> None:
    """Write the Markdown file `output`, ending with where it comes from, and a `.json` of the raw rows beside it.

    Args:
        output: the Markdown file; its folder is made.
        text: its lines.
        rows: what was measured.
        made: of `provenance`.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    lines = [*text, "", *(f"- {key}: {f'`{value}`' if key == 'command' else value}" for key, value in made.items())]
    output.write_text("\n".join(lines) + "\n")
    output.with_suffix(".json").write_text(json.dumps({**made, "rows": list(rows)}, indent=1) + "\n")

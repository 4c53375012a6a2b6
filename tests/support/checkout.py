"""This checkout, and copies of its working tree."""

from __future__ import annotations

import shutil
from pathlib import Path

ROOT = Path(__file__).parents[2]
_NOT_OURS = {".venv", ".git", "data", "checkpoints", "mlruns", "mlartifacts", "runs", "build", "dist"}


def copy_tree(target: Path) -> Path:
    """The working tree as it is, without what running it leaves behind."""

    def skip(folder: str, names: list[str]) -> set[str]:
        top = _NOT_OURS if Path(folder) == ROOT else set()
        return {
            n for n in names if n in top or n.endswith("cache__") or n.startswith("mlflow.db") or n.endswith("_cache")
        }

    shutil.copytree(ROOT, target, ignore=skip)
    return target

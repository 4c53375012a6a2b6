"""Every folder that a run writes: one list, by the functions that those who write ask for their places."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ssam_scale.config.schema import Config
from ssam_scale.config.trajectory_sections import SAFTrajectory
from ssam_scale.finding import Finding
from ssam_scale.folders import why_not_writable
from ssam_scale.tracking.spool import unsent_folder
from ssam_scale.tracking.store import refused, store_folders

from .build import outputs_folder


@dataclass(frozen=True)
class Written:
    """A folder that a run writes.

    Attributes:
        what: lies there.
        folder: which need not be there yet.
        refusal: the line for a reason why it cannot be written to.
        everywhere: whether every machine writes it, and not only the first process.
        needed: whether a run cannot do without it.
    """

    what: str
    folder: Path
    refusal: Callable[[str], str]
    everywhere: bool = False
    needed: bool = True

    def probed(self) -> Finding:
        """What comes of writing, renaming and removing a file there."""
        problem = why_not_writable(self.folder)
        if problem is None:
            return Finding("ok", self.what, f"{self.folder} can be written to")
        return Finding("fail" if self.needed else "warn", self.what, self.refusal(problem))


def written_folders(config: Config, backend: str) -> list[Written]:
    """What a run of this configuration writes.

    Args:
        config: of the run.
        backend: that it is on.
    """
    section, store = config.checkpoint, config.tracking.store
    found = [
        Written(
            "checkpoints",
            section.directory,
            lambda problem: f"checkpoint.directory {section.directory}: {problem}; choose another folder",
        )
    ]
    if store is not None:
        found += [
            Written("tracking store", folder, lambda problem: refused(store, problem))
            for folder in store_folders(store, config.tracking.experiment)
        ]
    # Of runs that were here before; a new one makes its own beside the checkpoints.
    found += [
        Written("unsent metrics", folder, lambda problem: f"metrics would not outlive the process: {problem}")
        for folder in _unsent_in(section.directory)
    ]
    if isinstance(config.trajectory, SAFTrajectory):
        outputs = outputs_folder(section.directory)
        found.append(
            Written("outputs of SAF", outputs, lambda problem: f"outputs cannot be written: {problem}", everywhere=True)
        )
    found.append(temporary_folder())
    if backend.startswith("zero"):
        found.append(extensions_folder())
    return found


def _unsent_in(checkpoints: Path) -> list[Path]:
    try:
        return list(checkpoints.glob(unsent_folder(Path(), "*").name))
    except OSError:  # which the folder's own probe says
        return []


def temporary_folder() -> Written:
    """Where tables and pictures are made on their way to the store, and what is compiled on its way to the disk."""
    try:
        folder = Path(tempfile.gettempdir())
    except OSError:  # none of those that are looked at can be written to
        folder = Path(os.environ.get("TMPDIR", "/tmp"))
    return Written(
        "temporary folder",
        folder,
        lambda problem: f"{problem}; tables, pictures and the logged model would be missing: set TMPDIR",
        everywhere=True,
        needed=False,
    )


def extensions_folder() -> Written:
    """Where torch compiles DeepSpeed's parts in C++."""
    from torch.utils.cpp_extension import get_default_build_root

    return Written(
        "DeepSpeed's compiled parts",
        Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()),
        lambda problem: f"{problem}; set TORCH_EXTENSIONS_DIR to a folder that can be written to",
        everywhere=True,
        needed=False,
    )

"""Whether something can be written to a folder, asked before there is anything to write."""

from __future__ import annotations

import os
from pathlib import Path


def why_not_writable(folder: Path) -> str | None:
    """Why a folder, which need not be there yet, cannot be written to, in a few words; None: it can. Makes nothing."""
    there = next((path for path in (folder, *folder.absolute().parents) if path.exists() or path.is_symlink()), folder)
    if not there.exists():
        return f"{there} is a link to nothing"
    if not there.is_dir():
        return f"{there} is not a folder"
    if not os.access(there, os.W_OK | os.X_OK):
        return f"{there} may not be written to by this user, or is on a disk that is read only"
    return None

"""Whether something can be written to a folder, asked before there is anything to write."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def why_not_writable(folder: Path) -> str | None:
    """Why a folder, which need not be there yet, cannot be written to, in a few words; None: it can.

    Asks by making a folder and removing it: by the bits of a file root may do anything, and yet not on every disk.
    """
    try:
        there = next((p for p in (folder, *folder.absolute().parents) if p.exists() or p.is_symlink()), folder)
    except OSError as error:  # a name that is too long
        return str(error.strerror or error)
    if not there.exists():
        return f"{there} is a link to nothing"
    if not there.is_dir():
        return f"{there} is not a folder"
    if not os.access(there, os.W_OK | os.X_OK):
        return f"{there} may not be written to by this user, or is on a disk that is read only"
    try:
        Path(tempfile.mkdtemp(dir=there, prefix=".ssam_scale_")).rmdir()
    except OSError as error:
        return f"nothing can be made in {there} ({error.strerror or error})"
    return None

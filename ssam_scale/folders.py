"""Whether something can be written to a folder, or in a file's place, asked before there is anything to write."""

from __future__ import annotations

import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

_KINDS = {
    stat.S_IFLNK: "a link",
    stat.S_IFBLK: "a device",
    stat.S_IFCHR: "a device",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
}

_PROBE_BYTES = 4096  # as much as a file system gives out at once


def existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there: on whose disk it is going to lie."""
    return next((path for path in (folder, *folder.absolute().parents) if path.is_dir()), Path("/"))


def why_not_replaceable(path: Path) -> str | None:
    """Why a file may not be put in the place of what is there, in a few words; None: it may.

    Where a link leads is not looked at: what it points to is another's to change, and as root a device's node would be
    gone.
    """
    try:
        kind = _KINDS.get(stat.S_IFMT(path.lstat().st_mode))
    except OSError:  # nothing is there, or whoever writes is told why not
        return None
    return None if kind is None else f"is {kind}; name a file, which need not be there yet"


def why_not_writable(folder: Path) -> str | None:
    """Why a folder, which need not be there yet, cannot be written to, in a few words; None: it can.

    Asks by writing a file there, renaming it and removing it, as checkpoints are: by the bits of a folder root may do
    anything, and yet not on every disk; a full one makes files and takes no bytes; some file systems do not rename.
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
    probe: Path | None = None
    try:
        handle, name = tempfile.mkstemp(dir=there, prefix=".ssam_scale_")
        probe = Path(name)
        with os.fdopen(handle, "wb") as file:
            file.write(bytes(_PROBE_BYTES))
        probe = probe.rename(f"{name}.renamed")
    except OSError as error:
        return f"nothing can be made in {there} ({error.strerror or error})"
    finally:
        if probe is not None:
            with suppress(OSError):
                probe.unlink()
    return None

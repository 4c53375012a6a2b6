"""Files and folders that are written whole or not at all, and whether they can be, asked before there is anything."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

RESULT = "result.json"
"""In the folder of checkpoints: the last evaluation of a run that is complete."""

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


def why_not_a_file(path: Path) -> str | None:
    """Why no file can be put there, in a few words; None: one can, also in the place of one that is there."""
    if (problem := why_not_replaceable(path)) is not None:
        return problem
    if not path.parent.is_dir():
        return f"there is no folder {path.parent}; make it, or name one that is there"
    return why_not_writable(path.parent)


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


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file, in whose place a reader finds the old one or all of the new one.

    Args:
        path: of the file, or of nothing yet; a file that is there keeps its permissions.
        write: writes to the path that it is given, which is beside it.

    Raises:
        OSError: it cannot be written; nothing half-written remains, whatever `write` raises.
    """
    mode = path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~_umask()
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    beside = Path(name)
    try:
        os.close(handle)
        write(beside)
        sync(beside)
        beside.chmod(mode)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder beside a path, which gets its name when all in it was written.

    Args:
        path: of nothing yet; or of an empty folder.

    Raises:
        OSError: it cannot be made; nothing half-written remains, whatever is raised within.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        beside.chmod(0o777 & ~_umask())
        yield beside
        for inside in beside.rglob("*"):
            inside.chmod((0o777 if inside.is_dir() else 0o666) & ~_umask())  # safetensors files are private otherwise
            sync(inside)
        sync(beside)
        beside.rename(path)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def why_not_a_new_folder(path: Path) -> str | None:
    """Why no folder can be made of this name, in a few words; None: it can, or there is an empty one."""
    if os.path.lexists(path) and (path.is_symlink() or not path.is_dir() or any(path.iterdir())):
        return "is there already; name another folder"
    return why_not_writable(path.parent)


def sync(path: Path) -> None:
    """Wait until the disk has a file, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():  # not every file system knows it of folders
            raise
    finally:
        os.close(handle)


def _umask() -> int:
    """The process's, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask

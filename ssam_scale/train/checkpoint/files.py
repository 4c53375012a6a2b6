"""The files of one checkpoint: written so that it is whole or not there, and read only if they are what was written."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ssam_scale.data.beton import checksum
from ssam_scale.sharding import World

from .parts import join, tensor_names

FORMAT = 5
STATE = "state.json"
_DIGEST = '{\n "sha256": "%s",'  # how state.json begins: the digest is of all that follows this

# In these no number is anything but finite, except in buffers that were not from the beginning (masks of attention).
_WEIGHTS = ("model", "ema")


@dataclass(frozen=True)
class Snapshot:
    """A checkpoint in memory, which training goes on without changing.

    Attributes:
        files: by name of the file without its suffix, tensors on the CPU by their names.
        state: what `state.json` says, but for digests.
        unbounded: names of buffers of the model that may hold infinities.
    """

    files: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Any]
    unbounded: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """Of all tensors."""
        return sum(t.numel() * t.element_size() for tensors in self.files.values() for t in tensors.values())


def not_finite(snapshot: Snapshot) -> str | None:
    """A weight of the model or of its average that is infinite or not a number, by its name."""
    for name in _WEIGHTS:
        for key, tensor in snapshot.files.get(name, {}).items():
            if not _is_finite(tensor) and key not in snapshot.unbounded:
                return key
    return None


def write(snapshot: Snapshot, final: Path) -> None:
    """Write a checkpoint beside its place, wait until the disk has it, and rename it.

    Raises:
        OSError: it could not be written; nothing half-written remains.
        SafetensorError: the same.
    """
    partial = final.with_name(f".{final.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        described = {}
        for name, tensors in snapshot.files.items():
            if tensors:
                file = partial / f"{name}.safetensors"
                save_file(dict(tensors), file)
                described[file.name] = {"bytes": file.stat().st_size, "sha256": checksum(file)}
        state = {**snapshot.state, "files": described, "unbounded": list(snapshot.unbounded)}
        (partial / STATE).write_text(state_text(state))
        mode = (partial / STATE).stat().st_mode
        for file in partial.iterdir():
            file.chmod(mode)  # safetensors files are private otherwise, also where the umask is not
            _sync(file)
        _sync(partial)
        if final.exists():
            remove(final)
        partial.rename(final)
        _sync(final.parent)
    except (OSError, SafetensorError):
        shutil.rmtree(partial, ignore_errors=True)
        raise


def remove(path: Path) -> None:
    """Delete a checkpoint so that what an interruption leaves of it does not look like one."""
    condemned = path.with_name(f".{path.name}.deleted")
    shutil.rmtree(condemned, ignore_errors=True)
    path.rename(condemned)
    shutil.rmtree(condemned, ignore_errors=True)


def sweep(directory: Path) -> None:
    """Remove what interrupted writing and deleting has left of checkpoints."""
    for path in [*directory.glob(".epoch_*.partial"), *directory.glob(".epoch_*.deleted")]:
        shutil.rmtree(path, ignore_errors=True)


def state_text(state: Mapping[str, Any]) -> str:
    """`state` as the text of a `state.json`, which begins with a digest of the rest of it."""
    body = json.dumps(state, indent=1).removeprefix("{")
    return _DIGEST % hashlib.sha256(body.encode()).hexdigest() + body


def read_state(path: Path) -> dict[str, Any]:
    """What `state.json` says, but for its own digest.

    Raises:
        ValueError: it cannot be read, is not what was written, or is of another format; says which.
    """
    try:
        raw = (path / STATE).read_bytes()
    except OSError as error:
        raise ValueError(f"{STATE} cannot be read: {error.strerror}") from error
    try:
        state = json.loads(raw)
        found = state["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{STATE} is damaged: {error}") from error
    if found != FORMAT:
        raise ValueError(f"it has format {found}, this version of ssam_scale reads format {FORMAT}")
    state.pop("sha256", None)
    if raw != state_text(state).encode():
        raise ValueError(f"{STATE} is damaged: it is not what was written")
    return dict(state)


def problem_with(path: Path, world: World) -> str | None:
    """Why a checkpoint cannot be used, in a few words; None: every byte is what was written. Collective.

    The files are shared out to the processes, the largest first.
    """
    try:
        state = read_state(path)
        files = sorted(state["files"], key=lambda name: -int(state["files"][name]["bytes"]))
        own = [_problem_of(path / file, state) for file in files[world.rank :: world.size]]
        own.append(_problem_of_parts(state))
    except ValueError as error:
        own = [str(error)]
    except (KeyError, TypeError, AttributeError) as error:
        own = [f"{STATE} has no {error}"]
    every = [problem for said in world.each_says(own) for problem in said if problem is not None]
    return every[0] if every else None


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a checkpoint says of itself, and the state of each part; of one that `problem_with` has no objection to.

    Raises:
        ValueError: it cannot be read.
    """
    state = read_state(path)
    try:
        files = {Path(name).stem: load_file(path / name) for name in state["files"]}
        return state, {name: join(part, files.get(name, {})) for name, part in state["parts"].items()}
    except (OSError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise ValueError(str(error)) from error


def _problem_of(file: Path, state: Mapping[str, Any]) -> str | None:
    """Of one file of tensors."""
    said = state["files"][file.name]
    try:
        if (size := file.stat().st_size) != said["bytes"]:
            return f"{file.name} has {size:,} bytes instead of {said['bytes']:,}"
        if checksum(file) != said["sha256"]:
            return f"{file.name} is damaged: its SHA-256 is not what was written"
        with safe_open(file, "pt") as tensors:
            wanted, found = set(tensor_names(state["parts"].get(file.stem))), set(tensors.keys())
            if wanted != found:
                return f"{file.name}: {sorted(wanted ^ found)[0]} is {'missing' if wanted - found else 'too much'}"
            if file.stem in _WEIGHTS:
                for key in sorted(found.difference(state["unbounded"])):
                    if not _is_finite(tensors.get_tensor(key)):
                        return f"{file.name}: {key} is not finite"
    except (OSError, SafetensorError) as error:
        return f"{file.name} cannot be read: {error}"
    return None


def _problem_of_parts(state: Mapping[str, Any]) -> str | None:
    """Every part with tensors has a file."""
    for name, part in state["parts"].items():
        if f"{name}.safetensors" not in state["files"] and next(tensor_names(part), None) is not None:
            return f"{name}.safetensors is not listed in {STATE}"
    return None


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def _sync(path: Path) -> None:
    """Wait until the disk has a file, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():  # not every file system knows it of folders
            raise
    finally:
        os.close(handle)

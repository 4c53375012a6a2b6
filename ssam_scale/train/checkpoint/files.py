"""The files of one checkpoint: written so that it is whole or not there, and read only if they are what was written."""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ssam_scale.data.beton import checksum
from ssam_scale.folders import sync
from ssam_scale.sharding import World
from ssam_scale.sharding.chunks import whole

from .parts import join, tensor_names
from .saved import open_tensors, part_of

FORMAT = 5
STATE = "state.json"
_DIGEST = '{\n "sha256": "%s",'  # how state.json begins: the digest is of all that follows this

# In these no number is anything but finite, except in buffers that were not from the beginning (masks of attention).
WEIGHTS = ("model", "ema")


@dataclass(frozen=True)
class Snapshot:
    """A checkpoint in memory, or what this process holds of it, which training goes on without changing.

    Attributes:
        files: by name of the file without its suffix, tensors on the CPU by their names.
        state: what `state.json` says, but for digests.
        unbounded: names of buffers of the model that may hold infinities.
        runs: where the checkpoint is sharded, of each file: by tensor, the place of its first element in the full
            tensor and their number; None: it is a full tensor.
    """

    files: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Any]
    unbounded: tuple[str, ...] = ()
    runs: Mapping[str, Mapping[str, tuple[int, int] | None]] | None = None

    @property
    def bytes(self) -> int:
        """Of these tensors."""
        return sum(t.numel() * t.element_size() for tensors in self.files.values() for t in tensors.values())


def not_finite(snapshot: Snapshot) -> str | None:
    """A weight of the model or of its average that is infinite or not a number, by its name."""
    for name, tensors in snapshot.files.items():
        for key, tensor in tensors.items() if part_of(name) in WEIGHTS else ():
            if not _is_finite(tensor) and key not in snapshot.unbounded:
                return key
    return None


def begin(final: Path) -> None:
    """Make the folder, beside a checkpoint's place, that its files are written to.

    Raises:
        OSError: it cannot be made.
    """
    discard(final)
    _partial(final).mkdir(parents=True)


def discard(final: Path) -> None:
    """Delete what was written since `begin`."""
    shutil.rmtree(_partial(final), ignore_errors=True)


def write_tensors(snapshot: Snapshot, final: Path) -> dict[str, Any]:
    """Write the files of tensors, and wait until the disk has them; after `begin`, of whichever process.

    Returns:
        What `state.json` says of each.

    Raises:
        OSError: a file could not be written.
        SafetensorError: the same.
    """
    partial, described = _partial(final), {}
    partial.mkdir(exist_ok=True)  # on another machine its name may come late
    (mode_of := partial / f".{secrets.token_hex(8)}").touch()
    mode = mode_of.stat().st_mode
    mode_of.unlink()
    for name, tensors in snapshot.files.items():
        if tensors:
            file = partial / f"{name}.safetensors"
            save_file(dict(tensors), file)
            file.chmod(mode)  # safetensors files are private otherwise, also where the umask is not
            sync(file)
            described[file.name] = {"bytes": file.stat().st_size, "sha256": checksum(file)}
            if snapshot.runs is not None:
                described[file.name]["runs"] = snapshot.runs[name]
    return described


def finish(snapshot: Snapshot, described: Mapping[str, Any], final: Path) -> None:
    """Write `state.json` beside the other files, wait until the disk has all, and give the folder its name.

    Args:
        snapshot: of the first process.
        described: what `write_tensors` returned, on all processes together.
        final: the checkpoint's place.

    Raises:
        OSError: it could not be written.
    """
    partial = _partial(final)
    state = {**snapshot.state, "files": dict(described), "unbounded": list(snapshot.unbounded)}
    (partial / STATE).write_text(state_text(state))
    sync(partial / STATE)
    sync(partial)
    if final.exists():
        remove(final)
    partial.rename(final)
    sync(final.parent)


def write(snapshot: Snapshot, final: Path) -> None:
    """Write a checkpoint beside its place, wait until the disk has it, and rename it.

    Raises:
        OSError: it could not be written; nothing half-written remains.
        SafetensorError: the same.
    """
    try:
        begin(final)
        finish(snapshot, write_tensors(snapshot, final), final)
    except (OSError, SafetensorError):
        discard(final)
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


def problem_with(path: Path, world: World, parts: Collection[str] | None = None) -> str | None:
    """Why a checkpoint cannot be used, in a few words; None: every byte is what was written. Collective.

    The files are shared out to the processes, the largest first.

    Args:
        path: the checkpoint.
        world: the processes.
        parts: that are going to be read; of others the files need not be there. None: all.
    """
    try:
        state = read_state(path)
        files = [name for name in state["files"] if parts is None or part_of(name) in parts]
        files.sort(key=lambda name: -int(state["files"][name]["bytes"]))
        own = [_problem_of(path / file, state) for file in files[world.rank :: world.size]]
        own.append(_problem_of_parts(state))
    except ValueError as error:
        own = [str(error)]
    except (KeyError, TypeError, AttributeError) as error:
        own = [f"{STATE} has no {error}"]
    every = [problem for said in world.each_says(own) for problem in said if problem is not None]
    return every[0] if every else None


def read(path: Path, parts: Collection[str] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a checkpoint says of itself, and the state of each part; of one that `problem_with` has no objection to.

    Args:
        path: the checkpoint.
        parts: which; None: all that there are.

    Returns:
        Of the parts, a `SavedTensor` for each tensor, of which nothing has been read.

    Raises:
        ValueError: it cannot be read.
    """
    state = read_state(path)
    try:
        wanted = [name for name in state["parts"] if parts is None or name in parts]
        tensors = open_tensors(path, state, wanted)
        return state, {name: join(state["parts"][name], tensors.get(name, {})) for name in wanted}
    except (OSError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise ValueError(str(error)) from error


def consolidate(path: Path, output: Path) -> Path:
    """Write a checkpoint that processes have saved in shards as one of full tensors.

    Args:
        path: the checkpoint, sharded or not; stays as it is.
        output: a folder; the checkpoint gets the same name in it.

    Returns:
        The new checkpoint.

    Raises:
        ValueError: `path` is no checkpoint, or damaged; or there is something in the new one's place.
        OSError: it could not be written.
    """
    if (problem := problem_with(path, World())) is not None:
        raise ValueError(f"checkpoint {path} cannot be read: {problem}")
    if os.path.lexists(final := output / path.resolve().name):
        raise ValueError(f"{final} exists; name another folder")
    state = read_state(path)
    tensors = whole(open_tensors(path, state))
    unbounded = state.pop("unbounded")
    write(Snapshot(tensors, {key: value for key, value in state.items() if key != "shapes"}, tuple(unbounded)), final)
    return final


def _problem_of(file: Path, state: Mapping[str, Any]) -> str | None:
    """Of one file of tensors."""
    said = state["files"][file.name]
    try:
        if (size := file.stat().st_size) != said["bytes"]:
            return f"{file.name} has {size:,} bytes instead of {said['bytes']:,}"
        if checksum(file) != said["sha256"]:
            return f"{file.name} is damaged: its SHA-256 is not what was written"
        with safe_open(file, "pt") as tensors:
            part = part_of(file.name)
            wanted = set(said["runs"] if "runs" in said else tensor_names(state["parts"].get(part)))
            found = set(tensors.keys())
            if wanted != found:
                return f"{file.name}: {sorted(wanted ^ found)[0]} is {'missing' if wanted - found else 'too much'}"
            for key, run in said.get("runs", {}).items():
                if run is not None and tensors.get_slice(key).get_shape() != [run[1]]:
                    return f"{file.name}: {key} does not have the {run[1]} elements that {STATE} says"
            if part in WEIGHTS:
                for key in sorted(found.difference(state["unbounded"])):
                    if not _is_finite(tensors.get_tensor(key)):
                        return f"{file.name}: {key} is not finite"
    except (OSError, SafetensorError) as error:
        return f"{file.name} cannot be read: {error}"
    return None


def _problem_of_parts(state: Mapping[str, Any]) -> str | None:
    """Every tensor of a part is in its file; or in several, whose runs of it make it up."""
    runs: dict[tuple[str, str], list[tuple[int, int] | None]] = {}
    for file, said in state["files"].items():
        for key, run in said.get("runs", {}).items():
            runs.setdefault((part_of(file), key), []).append(run)
    shapes = state.get("shapes", {})
    for name, part in state["parts"].items():
        if f"{name}.safetensors" in state["files"]:
            continue
        for key in tensor_names(part):
            if not (found := runs.get((name, key))):
                return f"{name}.safetensors is not listed in {STATE}" if not runs else f"{name}: {key} is in no file"
            if key not in shapes.get(name, {}):
                if found != [None]:
                    return f"{name}: {key} is in {len(found)} files"
                continue
            place = 0
            for start, count in sorted(run for run in found if run is not None):
                if start != place:
                    return f"{name}: {key} is in pieces that do not fit at element {min(start, place):,}"
                place += count
            if place != math.prod(shapes[name][key]):
                return f"{name}: {key} has {place:,} elements instead of {math.prod(shapes[name][key]):,}"
    return None


def _partial(final: Path) -> Path:
    return final.with_name(f".{final.name}.partial")


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    # Both are NaN where anything is. One pass, where `isfinite` takes 33 times as long to make a tensor of answers.
    return bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())

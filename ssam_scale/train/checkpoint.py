"""Checkpoints: whole tensors in safetensors files and the rest in JSON, so that nothing is ever unpickled.

    <directory>/epoch_0003/
        model.safetensors       weights and buffers under timm's names: timm loads this file as it is
        optimizer.safetensors   state of the base optimizer, `<parameter>|<entry>`
        average.safetensors     averaged weights, with an EMA
        sparse.safetensors      steps, calibration and, with a mask chosen by scores, when it was chosen last,
                                `mask.<parameter>`, `accumulated.<parameter>` and `reused.<parameter>`: see
                                `SparseSAM.sparse_state`
        state.json              epoch, step, model, configuration, the optimizer's numbers, the loss scale

Tensors are whole, so a run goes on under another backend or number of processes. A checkpoint appears under its name
only when it is complete: it is written beside it and renamed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ssam_scale.config.schema import Config
from ssam_scale.errors import UserError
from ssam_scale.models.ema import AveragedWeights
from ssam_scale.perturbation import SparseSAM
from ssam_scale.sharding import World

_FORMAT = 3
_BY_PARAMETER = ("mask", "accumulated", "reused")  # what of the perturbation's state is by parameter
_NAME = re.compile(r"epoch_(\d+)")


@dataclass(frozen=True)
class Progress:
    """How far a run has come.

    Attributes:
        epoch: epochs done.
        step: optimizer steps done.
        run_id: the tracked run, if there is one.
    """

    epoch: int = 0
    step: int = 0
    run_id: str | None = None


def _all(directory: Path) -> list[tuple[int, Path]]:
    """Epochs and checkpoints in `directory`, the earliest first."""
    return sorted((int(m[1]), p) for p in directory.glob("epoch_*") if (m := _NAME.fullmatch(p.name)))


def newest(directory: Path) -> Path | None:
    """The checkpoint of the latest epoch in `directory`."""
    found = _all(directory)
    return found[-1][1] if found else None


def refuse_to_mix(config: Config) -> None:
    """A run that starts afresh must not share its folder with another one, whose checkpoints it would take for its own.

    Raises:
        UserError: the folder has checkpoints.
    """
    directory = config.checkpoint.directory
    if (other := newest(directory)) is not None:
        raise UserError(
            f"checkpoint.directory {directory} has {other.name} of an earlier run: go on from it with --resume auto, "
            "or choose another folder"
        )


def resolve(config: Config) -> Path | None:
    """The checkpoint that `checkpoint.resume` names, None for a fresh start.

    Raises:
        UserError: the named checkpoint does not exist.
    """
    wanted = config.checkpoint.resume
    if wanted is None:
        return None
    if wanted == "auto":
        return newest(config.checkpoint.directory)
    path = Path(wanted)
    if not (path / "state.json").is_file():
        inside = newest(path)
        hint = f"; did you mean {inside}?" if inside else "; give a folder with a state.json, or auto"
        raise UserError(f"checkpoint.resume: {path} is not a checkpoint{hint}")
    return path


def save(
    config: Config,
    world: World,
    network: nn.Module,
    opt: SparseSAM,
    average: AveragedWeights | None,
    progress: Progress,
) -> None:
    """Write one checkpoint and drop the oldest beyond `checkpoint.keep`. Collective.

    Raises:
        UserError: the folder cannot be written; what was there is untouched and nothing half-written remains.
    """
    model, optimizer = opt.sharding.full_state_dict(network, opt.base_optimizer)
    files: dict[str, dict[str, Tensor]] = {"model": model, "sparse": _flat(opt.sparse_state())}
    files["optimizer"] = {
        f"{name}|{entry}": value
        for name, entries in optimizer.get("state", {}).items()
        for entry, value in entries.items()
        if isinstance(value, Tensor)
    }
    if average is not None:
        files["average"] = average.whole()
    numbers = {
        name: {entry: value for entry, value in entries.items() if not isinstance(value, Tensor)}
        for name, entries in optimizer.get("state", {}).items()
    }
    state = {
        "format": _FORMAT,
        "progress": vars(progress),
        "model": _identity(config),
        "method": config.method,
        "optimizer": config.optimizer.name,
        "optimizer_numbers": {name: entries for name, entries in numbers.items() if entries},
        "param_groups": optimizer.get("param_groups", []),
        "loss_scale": opt.scaler.state_dict() if opt.scaler is not None else None,
        "config": config.model_dump(mode="json"),
    }
    failure = _write(config, progress.epoch, files, state) if world.first else ""
    failed = world.sum(torch.tensor(int(bool(failure)), device=world.device))
    if int(failed):
        raise UserError(failure or "the first process could not write the checkpoint; its message says why")


def load(
    path: Path,
    config: Config,
    network: nn.Module,
    opt: SparseSAM,
    average: AveragedWeights | None,
) -> Progress:
    """Take up the run that `path` was saved of. Collective; every process reads the files.

    Raises:
        UserError: the checkpoint is damaged, or of another model or optimizer; nothing was loaded then.
    """
    try:
        state = json.loads((path / "state.json").read_text())
        if state["format"] != _FORMAT:
            raise ValueError(f"it has format {state['format']}, this version of ssam_scale reads format {_FORMAT}")
        files = {p.stem: load_file(p) for p in path.glob("*.safetensors")}
        progress = Progress(**state["progress"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"checkpoint {path} cannot be read: {error}") from error
    _check(path, config, state, files["model"], network, opt)
    if average is not None and "average" not in files:
        raise UserError(f"checkpoint {path} has no averaged weights; set train.ema_decay to null")
    optimizer: dict[str, Any] = {"state": state["optimizer_numbers"], "param_groups": state["param_groups"]}
    for key, value in files["optimizer"].items():
        name, entry = key.rsplit("|", 1)
        optimizer["state"].setdefault(name, {})[entry] = value
    configured = [{key: group[key] for key in opt.defaults} for group in opt.param_groups]
    opt.sharding.load_full_state_dict(network, opt.base_optimizer, files["model"], optimizer)
    # A run is what its configuration says: weight decay, momentum and the like may be changed on resuming.
    for group, options in zip(opt.param_groups, configured, strict=True):
        group.update(options)
    if opt.scaler is not None and state["loss_scale"] is not None:
        opt.scaler.load_state_dict(state["loss_scale"])
    try:
        opt.load_sparse_state(_nested(files["sparse"], opt))
    except ValueError as error:
        raise UserError(f"checkpoint {path}: {error}; perturbation.mask must be the one it was saved with") from error
    if average is not None:
        average.load(files["average"])
    return progress


def _flat(sparse: dict[str, Any]) -> dict[str, Tensor]:
    """The perturbation's state with what is by parameter under dotted names."""
    flat = {name: value for name, value in sparse.items() if name not in _BY_PARAMETER}
    return flat | {f"{kind}.{name}": tensor for kind in _BY_PARAMETER for name, tensor in sparse[kind].items()}


def _nested(flat: dict[str, Tensor], opt: SparseSAM) -> dict[str, Any]:
    """What `_flat` was given, where `opt` can take it."""
    result: dict[str, Any] = {kind: {} for kind in _BY_PARAMETER}
    # In the network's order, by which norms are summed up; the file has its own.
    place = {name: index for index, name in enumerate(opt.parameters.by_name)}
    for key in sorted(flat, key=lambda key: place.get(key.partition(".")[2], -1)):
        kind, dot, name = key.partition(".")
        if not dot:
            result[key] = flat[key]
        elif kind != "mask" and name in place:
            result[kind][name] = flat[key].to(opt.parameters.by_name[name].device)
        else:
            result[kind][name] = flat[key]
    return result


def _check(
    path: Path, config: Config, state: dict[str, Any], saved: dict[str, Tensor], network: nn.Module, opt: SparseSAM
) -> None:
    mine = {
        name: tuple(opt.sharding.full_shape(t) if isinstance(t, nn.Parameter) else t.shape)
        for name, t in network.state_dict(keep_vars=True).items()
    }
    theirs = {name: tuple(t.shape) for name, t in saved.items()}
    if mine != theirs:
        name = next(iter(sorted(n for n in mine.keys() | theirs.keys() if mine.get(n) != theirs.get(n))))
        raise UserError(
            f"checkpoint {path}, of {state['model']}, does not fit this run's {_identity(config)}: {name} is "
            f"{theirs.get(name, 'missing')} there and {mine.get(name, 'missing')} here"
        )
    if state["method"] != config.method:
        raise UserError(
            f"checkpoint {path} is of a {state['method']} run, this is a {config.method} run; resume with the "
            "perturbation it was made with, or choose another checkpoint.directory"
        )
    if state["optimizer"] != config.optimizer.name:
        raise UserError(
            f"checkpoint {path} was made with optimizer.name {state['optimizer']}, this run has {config.optimizer.name}"
        )


def _identity(config: Config) -> str:
    return f"{config.model.name} with {config.model.num_classes} classes"


def _write(config: Config, epoch: int, files: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> str:
    """Write the files; returns the message of a failure, empty if there was none."""
    directory = config.checkpoint.directory
    final, partial = directory / f"epoch_{epoch:04d}", directory / f".epoch_{epoch:04d}.partial"
    size = sum(t.numel() * t.element_size() for tensors in files.values() for t in tensors.values())
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name, tensors in files.items():
            # Copies, because the format refuses tied weights that share memory.
            copies = {key: t.cpu().clone(memory_format=torch.contiguous_format) for key, t in tensors.items()}
            save_file(copies, partial / f"{name}.safetensors")
        (partial / "state.json").write_text(json.dumps(state, indent=1))
        mode = (partial / "state.json").stat().st_mode
        for file in partial.iterdir():
            file.chmod(mode)  # safetensors files are private otherwise, also where the umask is not
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        existing = next((p for p in (directory, *directory.absolute().parents) if p.exists()), Path("/"))
        free = shutil.disk_usage(existing).free
        return (
            f"checkpoint.directory: {final} was not written: {error} "
            f"(needs {size / 2**20:.0f} MiB, {free / 2**20:.0f} MiB are free)"
        )
    older = [path for other, path in _all(directory) if other < epoch]
    for path in older[: max(0, len(older) - (config.checkpoint.keep - 1))]:
        shutil.rmtree(path, ignore_errors=True)
    return ""

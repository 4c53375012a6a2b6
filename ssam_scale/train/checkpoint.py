"""Checkpoints: the named parts of a run, each with `state_dict` and `load_state_dict`, in files that nothing unpickles.

    <directory>/epoch_0003/
        state.json              what the run is, and `parts`: the state of each part but its tensors
        model.safetensors       weights and buffers under timm's names: timm loads this file as it is
        optimizer.safetensors   state of the base optimizer
        sparse.safetensors      mask and calibration, see `SparseSAM.sparse`
        ema.safetensors         averaged weights, if there are any

`build.Components.state` says which parts a run has. A part's state is made of dictionaries, lists, plain values and
tensors; each tensor goes to the part's safetensors file, and `{"$tensor": its name there}` takes its place in the JSON.
Tensors are full, so a run goes on under another backend or number of processes. A checkpoint appears under its name
only when it is complete: it is written beside it and renamed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ssam_scale.config.micro_batches import MicroBatches
from ssam_scale.config.schema import Config
from ssam_scale.errors import UserError
from ssam_scale.folders import why_not_writable
from ssam_scale.models import build_model
from ssam_scale.perturbation import SparseSAM
from ssam_scale.perturbation.fused import fit_state
from ssam_scale.sharding import Sharding, World
from ssam_scale.tracking.store import plain_values

from .hooks import Hook
from .progress import Progress

if TYPE_CHECKING:
    from .build import Components

_FORMAT = 4
_TENSOR = "$tensor"
_NAME = re.compile(r"epoch_(\d+)")

# What a checkpoint may lack: a loss scale finds itself again within some steps.
_OPTIONAL = {"scaler"}
_MISSING = {"ema": "averaged weights; set train.ema_decay to null"}
_REFUSED = {"sparse": "; perturbation.mask must be the one it was saved with"}


class ModelState:
    """Weights and buffers as a part of a checkpoint, in full tensors.

    Args:
        network: the part of the model that names the parameters.
        sharding: how it is distributed.
    """

    def __init__(self, network: nn.Module, sharding: Sharding) -> None:
        self._network, self._sharding = network, sharding

    def state_dict(self) -> dict[str, Any]:
        """By name; complete on the first process. Collective."""
        return dict(self._sharding.full_model_state_dict(self._network))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` returned. Collective."""
        self._sharding.load_full_model_state_dict(self._network, state_dict)
        torch.clear_autocast_cache()  # an autocast around this may remember low-precision copies of those before


class OptimizerState:
    """The base optimizer's state as a part of a checkpoint, by parameter and in full tensors.

    Args:
        network: the part of the model that names the parameters.
        opt: around the base optimizer.
    """

    def __init__(self, network: nn.Module, opt: SparseSAM) -> None:
        self._network, self._opt = network, opt

    def state_dict(self) -> dict[str, Any]:
        """`state` and `param_groups`, by parameters' names; complete on the first process. Collective."""
        return self._opt.sharding.full_optimizer_state_dict(self._network, self._opt.base_optimizer)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` returned, but the options of the groups. Collective.

        A run is what its configuration says: weight decay, momentum and the like may be changed on resuming.
        """
        opt = self._opt
        # `initial_lr` is what the radius that follows the learning rate compares it with.
        keys = [*opt.defaults, "initial_lr"]
        configured = [{key: group[key] for key in keys if key in group} for group in opt.param_groups]
        opt.sharding.load_full_optimizer_state_dict(self._network, opt.base_optimizer, state_dict)
        for group, options in zip(opt.param_groups, configured, strict=True):
            group.update(options)
        fit_state(opt.base_optimizer)


class SaveCheckpoint(Hook):
    """Saves every `checkpoint.every_epochs` epochs and after the last.

    Args:
        config: of the run.
        world: the processes.
        components: whose state is saved.
    """

    def __init__(self, config: Config, world: World, components: Components) -> None:
        self._config, self._world, self._components = config, world, components

    def after_epoch(self, progress: Progress) -> None:
        """Collective."""
        if progress.epoch == self._config.train.epochs or progress.epoch % self._config.checkpoint.every_epochs == 0:
            save(self._config, self._world, self._components)


def _all(directory: Path) -> list[tuple[int, Path]]:
    """Epochs and checkpoints in `directory`, the earliest first."""
    return sorted((int(m[1]), p) for p in directory.glob("epoch_*") if (m := _NAME.fullmatch(p.name)))


def newest(directory: Path) -> Path | None:
    """The checkpoint of the latest epoch in `directory`."""
    found = _all(directory)
    return found[-1][1] if found else None


def check_fresh_directory(config: Config) -> None:
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


def check_writable(config: Config) -> None:
    """The folder of checkpoints can be written to, or made.

    Raises:
        UserError: it cannot.
    """
    if (problem := why_not_writable(config.checkpoint.directory)) is not None:
        raise UserError(f"checkpoint.directory {config.checkpoint.directory}: {problem}; choose another folder")


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


def micro_batch_of(path: Path, config: Config, world: World) -> int | None:
    """The images of a micro-batch that a checkpoint was saved with, where a run goes on as it was begun.

    So a resumed run with `max_micro_batch: auto` takes the same steps, unless the processes or the batch are others.
    """
    try:
        split = MicroBatches(**json.loads((path / "state.json").read_text())["micro_batches"])
        same = split.processes == world.size and split.batch == config.data.batch_size
    except (OSError, ValueError, KeyError, TypeError):  # `load` says what is wrong with it
        return None
    return split.images if same else None


def finished(path: Path, config: Config) -> Progress | None:
    """How far the run has come that a checkpoint was saved of, if that is this run and has all of its epochs."""
    try:
        state = json.loads((path / "state.json").read_text())
        described = _description(config)
        same = described == {key: state[key] for key in described}
        progress = Progress(images=0, batch_size=1)  # which only a run that goes on has
        progress.load_state_dict(state["parts"]["progress"])
    except (OSError, ValueError, KeyError, TypeError):  # `load` says what is wrong with it
        return None
    return progress if same and progress.epoch >= config.train.epochs else None


def save(config: Config, world: World, components: Components) -> None:
    """Write one checkpoint and drop the oldest beyond `checkpoint.keep`. Collective.

    Raises:
        UserError: the folder cannot be written; what was there is untouched and nothing half-written remains.
    """
    files: dict[str, dict[str, Tensor]] = {name: {} for name in components.state}
    state = {
        **_description(config),
        "config": plain_values(config),
        "micro_batches": asdict(components.split),
        "parts": {name: _split(part.state_dict(), files[name]) for name, part in components.state.items()},
    }
    failure = _write(config, components.progress.epoch, files, state) if world.first else ""
    failed = world.sum(torch.tensor(int(bool(failure)), device=world.device))
    if int(failed):
        raise UserError(failure or "the first process could not write the checkpoint; its message says why")


def load(path: Path, config: Config, components: Components) -> None:
    """Take up the run that `path` was saved of. Collective; every process reads the files.

    Raises:
        UserError: the checkpoint is damaged, or of another model, method, optimizer or mask; nothing was loaded then.
    """
    try:
        state = json.loads((path / "state.json").read_text())
        if state["format"] != _FORMAT:
            raise ValueError(f"it has format {state['format']}, this version of ssam_scale reads format {_FORMAT}")
        files = {p.stem: load_file(p) for p in path.glob("*.safetensors")}
        saved = {name: _join(part, files.get(name, {})) for name, part in state["parts"].items()}
        model = saved["model"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise UserError(f"checkpoint {path} cannot be read: {error}") from error
    _check(path, config, state, model, components)
    if missing := sorted(components.state.keys() - saved.keys() - _OPTIONAL):
        raise UserError(f"checkpoint {path} has no {_MISSING.get(missing[0], missing[0])}")
    for name, part in components.state.items():
        if name in saved:
            try:
                part.load_state_dict(saved[name])
            except ValueError as error:
                raise UserError(f"checkpoint {path}: {error}{_REFUSED.get(name, '')}") from error
    # The saved run's may have been others: of another batch size, or another number of images or processes.
    components.opt.rescale_steps(components.progress.place)


def network_of(path: Path, config: Config) -> nn.Module:
    """What a checkpoint has trained, timm's model on the CPU: with the averaged weights, if there are any."""
    weights = load_file(path / "model.safetensors")
    if (averaged := path / "ema.safetensors").is_file():
        weights |= load_file(averaged)
    with torch.random.fork_rng(devices=[]):
        network = build_model(config).model
    network.load_state_dict(weights)
    return network


def _split(value: Any, tensors: dict[str, Tensor], name: str = "") -> Any:
    """`value` as JSON, its tensors put into `tensors` under the keys that lead to them, joined by dots.

    Raises:
        TypeError: there is something in it that is neither a tensor nor JSON.
        ValueError: two tensors have one name.
    """
    if isinstance(value, Tensor):
        if name in tensors:
            raise ValueError(f"two tensors of a checkpoint have the name {name}")
        tensors[name] = value
        return {_TENSOR: name}
    prefix = f"{name}." if name else ""
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _split(each, tensors, f"{prefix}{key}") for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_split(each, tensors, f"{prefix}{index}") for index, each in enumerate(value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a checkpoint cannot hold {name or 'a state'}, which is a {type(value).__name__}")


def _join(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `_split` was given, tuples as lists.

    Raises:
        KeyError: a tensor is missing.
    """
    if isinstance(value, dict):
        if value.keys() == {_TENSOR}:
            return tensors[value[_TENSOR]]
        return {key: _join(each, tensors) for key, each in value.items()}
    return [_join(each, tensors) for each in value] if isinstance(value, list) else value


def _check(path: Path, config: Config, state: dict[str, Any], saved: dict[str, Tensor], components: Components) -> None:
    mine = {
        name: tuple(components.opt.sharding.full_shape(t) if isinstance(t, nn.Parameter) else t.shape)
        for name, t in components.network.state_dict(keep_vars=True).items()
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


def _description(config: Config) -> dict[str, Any]:
    """What must be the same for a run to go on from a checkpoint, but for what only the tensors show."""
    return {
        "format": _FORMAT,
        "model": _identity(config),
        "method": config.method,
        "optimizer": config.optimizer.name,
    }


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
            if not tensors:
                continue
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

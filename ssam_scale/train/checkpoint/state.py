"""What of a run is saved in a checkpoint, and a run that goes on from one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ssam_scale.config.micro_batches import MicroBatches
from ssam_scale.config.schema import Config
from ssam_scale.errors import UserError
from ssam_scale.models import build_network
from ssam_scale.sharding import World
from ssam_scale.sharding.chunks import Chunk, SavedTensor, whole
from ssam_scale.tracking.store import plain_values
from ssam_scale.train.early_stop import Patience
from ssam_scale.train.length import Length
from ssam_scale.train.progress import Progress

from .files import FORMAT, WEIGHTS, Snapshot, read, read_state
from .layout import saved_sharded
from .parts import ShardedStateful, split

if TYPE_CHECKING:
    from ssam_scale.train.build import Components
    from ssam_scale.train.evaluation import Evaluation

# What a checkpoint may lack: a loss scale finds itself again within some steps.
_OPTIONAL = {"scaler"}
_MISSING = {"ema": "averaged weights; set train.ema_decay to null"}
_REFUSED = {"sparse": "; perturbation.mask must be the one it was saved with"}


def snapshot_of(config: Config, world: World, components: Components, evaluation: Evaluation | None) -> Snapshot | None:
    """A copy of what this process saves; None where that is nothing. Collective.

    That is everything on the first process, or of a sharded checkpoint each one's own chunks.

    Args:
        config: of the run.
        world: the processes.
        components: whose state it is.
        evaluation: of the weights as they are, if there was one.
    """
    leaves: dict[str, dict[str, Tensor | Chunk]] = {name: {} for name in components.state}
    state = {
        **_description(config),
        "config": plain_values(config),
        "classes": _class_names(components),
        "micro_batches": asdict(components.split),
        "evaluation": None if evaluation is None else asdict(evaluation),
        "parts": {
            name: split(
                part.sharded_state_dict() if isinstance(part, ShardedStateful) else part.state_dict(), leaves[name]
            )
            for name, part in components.state.items()
        },
    }
    weights = {name for name, _ in components.network.named_parameters(remove_duplicate=False)}
    buffers = (leaves["model"].keys() | leaves.get("ema", {}).keys()) - weights
    unbounded = tuple(sorted(name for name in buffers if not name.endswith(("running_mean", "running_var"))))
    if saved_sharded(config.checkpoint.format, leaves, world):
        return _own_chunks(world, leaves, state, unbounded)
    files: dict[str, dict[str, Tensor]] = {name: {} for name in leaves}
    for name, of_part in leaves.items():
        for key, leaf in of_part.items():
            full = leaf.gather() if isinstance(leaf, Chunk) else leaf  # collective, also where it is thrown away
            if world.first:
                files[name][key] = _copy(full)
    return Snapshot(files, state, unbounded) if world.first else None


def _own_chunks(
    world: World, leaves: dict[str, dict[str, Tensor | Chunk]], state: dict[str, Any], unbounded: tuple[str, ...]
) -> Snapshot:
    files: dict[str, dict[str, Tensor]] = {}
    runs: dict[str, dict[str, tuple[int, int] | None]] = {}
    shapes: dict[str, dict[str, list[int]]] = {}
    for part, of_part in leaves.items():
        name = f"{part}.rank_{world.rank:05d}"
        files[name], runs[name], shapes[part] = {}, {}, {}
        for key, leaf in of_part.items():
            if isinstance(leaf, Chunk):
                shapes[part][key] = list(leaf.shape)
                if leaf.primary:
                    files[name][key] = _copy(leaf.local.reshape(-1))
                    runs[name][key] = leaf.start, leaf.local.numel()
            elif world.first:
                files[name][key], runs[name][key] = _copy(leaf), None
    return Snapshot(files, {**state, "shapes": shapes}, unbounded, runs)


def load(path: Path, config: Config, components: Components) -> None:
    """Take up the run that `path` was saved of. Collective; every process reads what it needs of the files.

    Raises:
        UserError: the checkpoint is damaged, or of another model, method, optimizer or mask; nothing was loaded then.
    """
    try:
        state, saved = read(path)
        model = saved["model"]
        _check(path, config, state, model, components)
        if "ema" in saved:
            _check_averages(path, saved["ema"], components)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"checkpoint {path} cannot be read: {error}") from error
    if missing := sorted(components.state.keys() - saved.keys() - _OPTIONAL):
        raise UserError(f"checkpoint {path} has no {_MISSING.get(missing[0], missing[0])}")
    for name, part in components.state.items():
        if name in saved:
            try:
                sharded = isinstance(part, ShardedStateful)
                part.load_state_dict(saved[name] if sharded else whole(saved[name]))
            except ValueError as error:
                raise UserError(f"checkpoint {path}: {error}{_REFUSED.get(name, '')}") from error
    # The saved run's may have been others: of another batch size, or another number of images or processes.
    components.opt.rescale_steps(components.progress.place)


def micro_batch_of(path: Path, config: Config, world: World) -> int | None:
    """The images of a micro-batch that a checkpoint was saved with, where a run of the same batch goes on with them.

    So a resumed run with `max_micro_batch: auto` takes the same steps, unless the processes are others. One without a
    limit that has lost processes takes more micro-batches of the size that is known to fit, and not larger ones.
    """
    try:
        shared = MicroBatches(**read_state(path)["micro_batches"])
        fitting = shared.processes == world.size
        if config.train.max_micro_batch is None:
            fitting = shared.processes >= world.size
        same = fitting and shared.batch == config.data.batch_size
    except (ValueError, KeyError, TypeError):  # `load` says what is wrong with it
        return None
    return shared.images if same else None


def finished(path: Path, config: Config, length: Length) -> Progress | None:
    """How far the run has come that a checkpoint was saved of, if that is this run and is complete."""
    try:
        state = read_state(path)
        described = _description(config)
        same = described == {key: state[key] for key in described}
        progress = Progress(length, patience=Patience(config.train.early_stop))
        progress.load_state_dict(state["parts"]["progress"])
    except (ValueError, KeyError, TypeError):  # `load` says what is wrong with it
        return None
    return progress if same and progress.ended and not progress.unevaluated else None


def evaluation_of(path: Path) -> Evaluation | None:
    """Of the weights of a checkpoint that `problem_with` has no objection to; None: there was none."""
    from ssam_scale.train.evaluation import Evaluation

    found = read_state(path)["evaluation"]
    return None if found is None else Evaluation(**found)


def place_in_data(path: Path) -> tuple[int, int]:
    """Epochs done and images seen of the next one, of a checkpoint that `problem_with` has no objection to."""
    progress = read_state(path)["parts"]["progress"]
    return int(progress["epoch"]), int(progress["seen"])


def network_of(path: Path, config: Config, *, averaged: bool = True) -> nn.Module:
    """What a checkpoint has trained, timm's model on the CPU.

    Args:
        path: of one that `problem_with` has no objection to, as far as the parts `WEIGHTS` go.
        config: of the run.
        averaged: with the averaged weights, if there are any.

    Raises:
        UserError: they are of another network than the configuration's.
    """
    state, saved = read(path, WEIGHTS)
    weights = whole({**saved["model"], **(saved.get("ema", {}) if averaged else {})})
    network = build_network(config)
    mine = {name: (tuple(tensor.shape),) for name, tensor in network.state_dict().items()}
    _refuse_another(path, config, state, mine, {name: (tuple(tensor.shape),) for name, tensor in weights.items()})
    network.load_state_dict(weights)
    return network


def _copy(tensor: Tensor) -> Tensor:
    """On the CPU, contiguous, and sharing memory with nothing: the format refuses tied weights that do."""
    if tensor.device.type != "cpu":
        return tensor.detach().cpu().contiguous()
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _check(
    path: Path, config: Config, state: dict[str, Any], saved: dict[str, SavedTensor], components: Components
) -> None:
    mine = {
        name: (tuple(components.opt.sharding.full_shape(t) if isinstance(t, nn.Parameter) else t.shape), _kind(t))
        for name, t in components.network.state_dict(keep_vars=True).items()
    }
    theirs = {name: (tuple(t.shape), _kind(t)) for name, t in saved.items()}
    _refuse_another(path, config, state, mine, theirs)
    if state["method"] != config.method:
        raise UserError(
            f"checkpoint {path} is of a {state['method']} run, this is a {config.method} run; resume with the "
            "perturbation and trajectory it was made with, or choose another checkpoint.directory"
        )
    if state["optimizer"] != config.optimizer.name:
        raise UserError(
            f"checkpoint {path} was made with optimizer.name {state['optimizer']}, this run has {config.optimizer.name}"
        )


def _refuse_another(
    path: Path,
    config: Config,
    state: dict[str, Any],
    mine: dict[str, tuple[Any, ...]],
    theirs: dict[str, tuple[Any, ...]],
) -> None:
    """Say in which tensor a checkpoint's network differs from the configured one, by what each of them says of it."""
    if mine == theirs:
        return
    name = first_differing(mine, theirs)
    here, there = ("".join(map(str, found.get(name, ("missing",)))) for found in (mine, theirs))
    raise UserError(
        f"checkpoint {path}, of {state['model']}, does not fit this run's {_identity(config)}: {name} is {there} "
        f"there and {here} here"
    )


def first_differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """The first name, in alphabetical order, of which two that are not equal say different things."""
    return min(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def _class_names(components: Components) -> list[str]:
    """By label; empty: nobody has named them."""
    return components.train.source.class_names or components.val.source.class_names


def _check_averages(path: Path, saved: dict[str, SavedTensor], components: Components) -> None:
    if components.ema is None:
        return
    mine, theirs = components.ema.shapes(), {name: tuple(t.shape) for name, t in saved.items()}
    if mine != theirs:
        name = first_differing(mine, theirs)
        raise UserError(
            f"checkpoint {path}: the average of {name} is {theirs.get(name, 'missing')} there and "
            f"{mine.get(name, 'missing')} here"
        )


def _kind(tensor: Tensor | SavedTensor) -> str:
    """What must be alike of dtypes: weights of any precision go on in any other."""
    return "" if tensor.dtype.is_floating_point else f" of {tensor.dtype}".replace("torch.", "")


def _description(config: Config) -> dict[str, Any]:
    """What must be the same for a run to go on from a checkpoint, but for what only the tensors show."""
    return {
        "format": FORMAT,
        "model": _identity(config),
        "method": config.method,
        "optimizer": config.optimizer.name,
    }


def _identity(config: Config) -> str:
    return f"{config.model.name} with {config.model.num_classes} classes"

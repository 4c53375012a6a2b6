"""A trained network, from a checkpoint or a file of weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssam_scale.config.load import load, resolved
from ssam_scale.config.schema import Config
from ssam_scale.data import Batch
from ssam_scale.data.opening import names_of_classes
from ssam_scale.errors import UserError
from ssam_scale.models import build_network, load_pretrained
from ssam_scale.sharding import World
from ssam_scale.sharding.device import PRECISIONS, choose_device, to_device, use_device
from ssam_scale.train.build import check_precision
from ssam_scale.train.checkpoint.files import STATE, WEIGHTS, problem_with, read_state
from ssam_scale.train.checkpoint.state import network_of
from ssam_scale.train.evaluation import logits_of

Watch = Callable[[Iterable[Batch], int], Iterable[Batch]]
"""Passes batches on, of which there are so many, and shows how far it is."""


def unwatched(batches: Iterable[Batch], count: int) -> Iterable[Batch]:
    """The same batches, of which nothing is shown."""
    return batches


@dataclass(frozen=True)
class Trained:
    """A network that was trained, and by what.

    Attributes:
        network: timm's, in evaluation mode, float32, on the CPU.
        config: of its run, with what was overridden.
        class_names: by label, of the images that it was trained on; empty: nobody has named them.
        source: where it is from, for people.
        batch: images of a forward.
        weights: what kind they are: `averaged` over the run's steps, `raw`, or the mean of several checkpoints'.
    """

    network: nn.Module
    config: Config
    class_names: list[str]
    source: str
    batch: int
    weights: str

    @property
    def classes(self) -> int:
        """That it tells apart."""
        return self.config.model.num_classes

    def named(self, label: int) -> str:
        """A class, for people."""
        return self.class_names[label] if label < len(self.class_names) else str(label)


class Forward:
    """The logits of a trained network on this process's device, as its run evaluated.

    Args:
        trained: the network, which stays there.

    Attributes:
        device: where images have to be.
        network: moved there.

    Raises:
        UserError: there is not the device that is asked for, or it does not compute in the precision.
    """

    def __init__(self, trained: Trained) -> None:
        config = trained.config
        self.device = choose_device(config.train.device)
        check_precision(config, self.device)
        use_device(self.device)
        self.network = to_device(trained.network, self.device).eval()
        self._precision, self._flip = PRECISIONS[config.train.precision], config.data.eval_flip

    def __call__(self, images: Tensor) -> Tensor:
        """Float32 [N, classes] of normalised images [N, 3, H, W].

        Raises:
            UserError: the device has no memory for so many at once.
        """
        try:
            return logits_of(self.network, images, self._precision, self._flip)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"{self.device}: no memory for {len(images)} images at once; give a smaller data.eval_batch_size"
            ) from error


def open_trained(
    place: Path, overrides: Sequence[str] = (), *, config_file: Path | None = None, ema: bool | None = None
) -> Trained:
    """Load a network.

    Args:
        place: a checkpoint, sharded or not; or a file of weights.
        overrides: of the run's configuration, such as `data.eval_resolution=288`.
        config_file: of a file of weights, the configuration that says which network it is of.
        ema: the averaged weights, or not; None: those, where there are any.

    Raises:
        UserError: it is damaged, or of another network than the configuration says; or `ema`, and there are none.
    """
    trained = _of_checkpoint(place, overrides, ema) if config_file is None else _of_file(place, overrides, config_file)
    if config_file is not None and ema:
        raise UserError(f"--ema: {place} is a file of weights, and does not say which of them are averaged")
    _try_forward(trained)
    return trained


def read_trained_state(path: Path, world: World | None = None) -> dict[str, Any]:
    """What a checkpoint's `state.json` says, once each byte of its weights is known to be what was written.

    Args:
        path: of the checkpoint.
        world: the processes, which share the work; collective then. None: this one alone.

    Raises:
        UserError: it is not.
    """
    if (problem := problem_with(path, world or World(), WEIGHTS)) is not None:
        raise UserError(f"checkpoint {path} cannot be read: {problem}")
    return read_state(path)


def has_averages(state: dict[str, Any], path: Path, ema: bool | None) -> bool:
    """Whether averaged weights are to be taken, of a checkpoint that may have some.

    Raises:
        UserError: they are asked for, and it has none.
    """
    there = "ema" in state["parts"]
    if ema and not there:
        raise UserError(f"--ema: checkpoint {path} has no averaged weights (train.ema_decay was null)")
    return there and ema is not False


def _of_checkpoint(path: Path, overrides: Sequence[str], ema: bool | None) -> Trained:
    state = read_trained_state(path)
    averaged = has_averages(state, path, ema)
    config = resolved(state["config"], {(): f"{path / STATE}, config"}, overrides)
    network = network_of(path, config, averaged=averaged)
    names = state.get("classes") or _names_now(config)
    if len(names) > config.model.num_classes:
        names = []
    shared = state["micro_batches"]
    batch = config.data.eval_batch_size
    return Trained(
        network.eval(),
        config,
        list(names),
        str(path),
        # As many as fitted in training; of one process the very batches of its evaluation.
        int(shared["images"]) if batch is None else max(1, batch // int(shared["processes"])),
        f"mean of {len(of)} checkpoints'" if (of := state.get("average_of")) else "averaged" if averaged else "raw",
    )


def _of_file(path: Path, overrides: Sequence[str], config_file: Path) -> Trained:
    config = load(config_file, overrides)
    network = build_network(config)
    loaded = load_pretrained(network, path)
    if loaded.new:
        raise UserError(
            f"{path}: has no {', '.join(loaded.new[:3])} of {config.model.name} with {config.model.num_classes} "
            f"classes (model.num_classes), as {config_file} says"
        )
    batch = config.data.eval_batch_size or min(config.data.batch_size, _FITS)
    return Trained(network.eval(), config, _names_now(config), loaded.source, batch, "raw")


_FITS = 256  # images of a forward, where no training has shown how many fit


def _names_now(config: Config) -> list[str]:
    """Of the classes, by what is there now of the training's images: older checkpoints do not say them."""
    for place in (config.data.train, config.data.val):
        try:
            names = names_of_classes(place)
        except UserError:  # they need not be on this machine
            continue
        if 0 < len(names) <= config.model.num_classes:
            return names
    return []


@torch.no_grad()
def _try_forward(trained: Trained) -> None:
    """A resolution that the network cannot take is found out here, in one line."""
    side = trained.config.data.eval_resolution
    try:
        trained.network(torch.zeros(1, 3, side, side))
    except (AssertionError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        name = trained.config.model.name
        raise UserError(f"data.eval_resolution: {name} cannot take images of {side} px: {reason}") from error

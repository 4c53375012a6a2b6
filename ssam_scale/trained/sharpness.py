"""How sharp the minima of several checkpoints are, of the same images and along the same random directions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ssam_scale.config.load import resolved
from ssam_scale.config.schema import Config
from ssam_scale.errors import NotFiniteError, UserError
from ssam_scale.sharding import World
from ssam_scale.sharpness import Measures, Sharpness, curve, filter_normalized, measure, plane
from ssam_scale.train.checkpoint.files import STATE
from ssam_scale.train.checkpoint.state import network_of
from ssam_scale.train.memory import is_out_of_memory
from ssam_scale.train.sharpness import Batches, fixed_batches, mean_loss

from .network import has_averages, read_trained_state


@dataclass(frozen=True)
class Asked:
    """What is to be measured of each checkpoint.

    Attributes:
        measures: at the weights themselves.
        data: `train`, `val`, or a place of images: of the first checkpoint's run, for all of them.
        images: how many, or all where there are not so many.
        micro_batch: images of one pass on one process.
        ema: the averaged weights, or not; None: those, where there are any, as evaluations take them.
        span: how far to either side the loss is looked at along the directions; None: it is not.
        points: along one of them.
        plane: along two at once as well.
    """

    measures: Measures
    data: str = "train"
    images: int = 1024
    micro_batch: int = 32
    ema: bool | None = None
    span: float | None = None
    points: int = 21
    plane: bool = False

    @property
    def places(self) -> list[float]:
        """Where along a direction, from −span to span."""
        span = self.span or 0.0
        return [span * (2.0 * n / (self.points - 1) - 1.0) for n in range(self.points)]


@dataclass(frozen=True)
class Found:
    """What was measured of one checkpoint.

    Attributes:
        label: a name that the others do not have.
        checkpoint: its folder.
        method, model: of its run.
        epoch: epochs done; None: it is an average of several checkpoints.
        sharpness: at its weights.
        places: along the directions; empty: not asked for.
        curve: the loss at each of them.
        plane: the same along two directions, a row for each place along the second; None: not asked for.
    """

    label: str
    checkpoint: str
    method: str
    model: str
    epoch: int | None
    sharpness: Sharpness
    places: list[float]
    curve: list[float]
    plane: list[list[float]] | None

    def row(self) -> dict[str, Any]:
        """Plain values, those of `sharpness` among them."""
        values = asdict(self)
        return {**{key: values[key] for key in ("label", "checkpoint", "method", "model", "epoch")},
                **values.pop("sharpness"),
                **{key: values[key] for key in ("places", "curve", "plane")}}  # fmt: skip


@dataclass(frozen=True)
class _Opened:
    path: Path
    config: Config
    epoch: int | None
    averaged: bool


def sharpness_of(
    places: Sequence[Path], asked: Asked, world: World, say: Callable[[str], object] = lambda line: None
) -> list[Found]:
    """Measure each checkpoint, whole or sharded, one after the other. Collective.

    Every process reads the whole weights, and its share of the images; the vectors are shared out to the processes.

    Args:
        places: checkpoints.
        asked: what is measured.
        world: the processes.
        say: is told what goes on.

    Raises:
        UserError: one is damaged, or of a model that there is not; the images cannot be read. All of it before anything
            is measured.
    """
    opened = [_open(place, asked, world) for place in places]
    batches = [_batches(each, opened[0], asked, world) for each in opened]
    networks: list[nn.Module | None] = [network_of(each.path, each.config, averaged=each.averaged) for each in opened]
    found = []
    for number, (each, label) in enumerate(zip(opened, _labels(opened), strict=True)):
        say(f"{label}: {each.path}")
        network, networks[number] = networks[number], None
        assert network is not None
        try:
            found.append(_measured(each, label, network, batches[number], asked, world))
        except NotFiniteError as error:
            raise UserError(f"{each.path}: {error}") from error
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(
                f"{each.path}: {asked.micro_batch} images of a pass do not fit into memory; lower --micro-batch, ask "
                "for fewer --eigenvalues, or start more processes with torchrun, which share the vectors"
            ) from error
    return found


def _measured(each: _Opened, label: str, network: nn.Module, batches: Batches, asked: Asked, world: World) -> Found:
    loss = mean_loss(each.config, network, batches, world)
    sharpness = measure(loss, asked.measures)
    places, along, over = [], [], None
    if asked.span is not None:
        places, seed = asked.places, asked.measures.seed
        first = filter_normalized(loss.weights, seed)
        along = curve(loss, first, places)
        if asked.plane:
            over = plane(loss, (first, filter_normalized(loss.weights, seed + 1)), places)
    return Found(
        label, str(each.path), each.config.method, each.config.model.name, each.epoch, sharpness, places, along, over
    )


def _open(path: Path, asked: Asked, world: World) -> _Opened:
    """A checkpoint of whose weights every byte is what was written. Collective."""
    state = read_trained_state(path, world)
    config = resolved(state["config"], {(): f"{path / STATE}, config"})
    progress = state["parts"].get("progress")  # which an average of checkpoints has not
    epoch = None if progress is None else int(progress["epoch"])
    return _Opened(path, config, epoch, has_averages(state, path, asked.ema))


def _batches(each: _Opened, first: _Opened, asked: Asked, world: World) -> Batches:
    """This process's share of the images of the first checkpoint, cropped and normalised as each one's evaluations."""
    data = first.config.data
    place = {"train": data.train, "val": data.val}.get(asked.data) or Path(asked.data)
    # Whatever else these runs' files are, they need not be on this machine.
    changed = {"train": place, "val": place, "subset": data.subset if place == data.train else None}
    config = each.config.model_copy(update={"data": each.config.data.model_copy(update=changed)})
    return fixed_batches(config, world, place, asked.images, asked.micro_batch)


def _labels(opened: Sequence[_Opened]) -> list[str]:
    """The method where it tells a checkpoint from the others, else with what of the paths does."""
    methods = [each.config.method for each in opened]
    if len(set(methods)) == len(methods):
        return methods
    parts = [each.path.parts for each in opened]
    same = [part for part in parts[0] if all(part in each for each in parts)]
    told = ["/".join(part for part in each if part not in same) or each[-1] for each in parts]
    return [f"{method} {path}" for method, path in zip(methods, told, strict=True)]

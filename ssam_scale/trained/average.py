"""The uniform average of the weights of several checkpoints: a model soup (Wortsman et al., 2203.05482)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from ssam_scale.config.schema import Config
from ssam_scale.data import train_loader
from ssam_scale.errors import UserError
from ssam_scale.folders import why_not_a_new_folder
from ssam_scale.perturbation.batchnorm import batchnorms
from ssam_scale.sharding.chunks import SavedTensor
from ssam_scale.train.checkpoint import checkpoints
from ssam_scale.train.checkpoint.files import WEIGHTS, Snapshot, read, write
from ssam_scale.train.checkpoint.parts import split
from ssam_scale.train.checkpoint.state import first_differing

from .network import Forward, Trained, Watch, has_averages, open_trained, read_trained_state, unwatched

IMAGES = 50_000
"""Of an epoch's order, by which BatchNorm's statistics are made anew: 50 of each class of ImageNet."""

# What a run's state has, and an average has not: no run goes on from it.
_KEPT = ("format", "model", "method", "optimizer", "config", "classes", "micro_batches", "unbounded")


@dataclass(frozen=True)
class Averaged:
    """What was made.

    Attributes:
        place: the new checkpoint, of weights alone.
        of: the checkpoints whose weights were averaged.
        weights: `averaged`, where these were averages over a run's steps, or `raw`.
        batchnorms: layers that keep running statistics.
        images: by which these were made anew; 0: they are averages, too.
    """

    place: Path
    of: tuple[Path, ...]
    weights: str
    batchnorms: int
    images: int

    def __str__(self) -> str:
        made = f"{self.place}: the mean of {len(self.of)} checkpoints' {self.weights} weights"
        if not self.batchnorms:
            return made
        if self.images:
            return f"{made}; BatchNorm's statistics are of {self.images:,} training images"
        return (
            f"{made}; BatchNorm's statistics are averages, too, and not those of the averaged weights: --data makes "
            "them anew from training images"
        )


def average(
    places: Sequence[Path],
    output: Path,
    *,
    last: int | None = None,
    ema: bool | None = None,
    data: Path | None = None,
    watch: Watch = unwatched,
) -> Averaged:
    """Write a checkpoint of averaged weights, with which everything works but going on with a run.

    Means are taken in float64 and kept as each tensor was; of numbers that are no floats, the first checkpoint's.

    Args:
        places: checkpoints, sharded or not; or one folder of them.
        output: of the new one; nothing is there yet.
        last: of a folder, this many of the newest.
        ema: as of `open_trained`, of each.
        data: training images, as `data.train` has them; None: BatchNorm's statistics are averaged.
        watch: shows how far the images are.

    Raises:
        UserError: fewer than two checkpoints; one is damaged, or of another network; it cannot be written.
    """
    chosen = _chosen(places, last)
    if (problem := why_not_a_new_folder(output)) is not None:
        raise UserError(f"-o {output}: {problem}")
    states = [read_trained_state(path) for path in chosen]
    averaged = [has_averages(state, path, ema) for state, path in zip(states, chosen, strict=True)]
    if len(set(averaged)) > 1:
        with_, without = (chosen[averaged.index(has)] for has in (True, False))
        raise UserError(f"{with_} has averaged weights, and {without} has none: --no-ema takes the raw ones of all")
    saved = [_weights(path, has) for path, has in zip(chosen, averaged, strict=True)]
    _check_alike(chosen, states, saved)
    mean = {name: _mean([each[name] for each in saved]) for name in saved[0]}
    images = 0
    trained = open_trained(chosen[0], [], ema=averaged[0])
    trained.network.load_state_dict(mean)
    norms = len(batchnorms(trained.network))
    if data is not None:
        images = _statistics_anew(trained, data, watch) if norms else 0
        mean = {name: tensor.detach().cpu().clone() for name, tensor in trained.network.state_dict().items()}
    _write(output, states[0], mean, chosen)
    return Averaged(output, tuple(chosen), "averaged" if averaged[0] else "raw", norms, images)


def _chosen(places: Sequence[Path], last: int | None) -> list[Path]:
    if last is None:
        if len(places) == 1 and (inside := checkpoints(places[0])):
            raise UserError(f"{places[0]}: has {len(inside)} checkpoints; say how many of the newest: --last 5")
        if len(places) < 2:
            raise UserError(f"{places[0]}: one checkpoint has no average; give two or more, or a folder and --last")
        if len({path.resolve() for path in places}) < len(places):
            raise UserError("a checkpoint is given twice; an average counts each once")
        return list(places)
    if len(places) != 1:
        raise UserError(f"--last {last}: is of one folder of checkpoints, and {len(places)} are given")
    found = checkpoints(places[0])
    if not 2 <= last <= len(found):
        raise UserError(f"--last {last}: {places[0]} has {len(found)} checkpoints, of which two or more are averaged")
    return found[-last:]


def _weights(path: Path, averaged: bool) -> dict[str, SavedTensor]:
    try:
        _, saved = read(path, WEIGHTS)
    except ValueError as error:
        raise UserError(f"checkpoint {path} cannot be read: {error}") from error
    return {**saved["model"], **(saved["ema"] if averaged else {})}


def _check_alike(
    chosen: Sequence[Path], states: Sequence[dict[str, Any]], saved: Sequence[dict[str, SavedTensor]]
) -> None:
    """Refuse what is not one network trained several times.

    Raises:
        UserError: it is not; names a tensor, or says which classes differ.
    """
    first = {name: tuple(tensor.shape) for name, tensor in saved[0].items()}
    for path, state, each in zip(chosen, states, saved, strict=True):
        shapes = {name: tuple(tensor.shape) for name, tensor in each.items()}
        if shapes != first:
            name = first_differing(first, shapes)
            there, here = (str(found.get(name, "missing")) for found in (first, shapes))
            raise UserError(f"{path}: {name} is {here}, and {there} in {chosen[0]}: weights of one network are needed")
        names = [known for known in (state.get("classes"), states[0].get("classes")) if known]
        if len(names) == 2 and names[0] != names[1]:  # older checkpoints do not say them
            raise UserError(f"{path}: was trained on other classes than {chosen[0]}, or in another order")


def _mean(tensors: Sequence[SavedTensor]) -> Tensor:
    first = tensors[0].whole()
    if not first.is_floating_point():
        return first
    total = first.double()
    for other in tensors[1:]:
        total += other.whole().double()
    return (total / len(tensors)).to(first.dtype)


def _statistics_anew(trained: Trained, place: Path, watch: Watch) -> int:
    """BatchNorm's statistics of training crops under the network's weights; of how many images."""
    config: Config = trained.config
    changed = {"train": place, "val": place, "subset": None, "progressive": None, "order": "random"}
    data = config.data.model_copy(update={**changed, "batch_size": trained.batch})
    forward = Forward(trained)
    loader = train_loader(
        data,
        rank=0,
        world_size=1,
        device=forward.device,
        seed=config.train.seed,
        micro_batch=trained.batch,
        num_classes=trained.classes,
    )
    count = min(len(loader), -(-IMAGES // trained.batch))
    with closing(iter(loader)) as batches:
        few = (batch.images for _, batch in zip(range(count), watch(batches, count), strict=False))
        # As Izmailov et al. (1803.05407) do: the mean over batches, each of which counts alike.
        update_bn(few, _Calling(forward))
    return count * trained.batch


class _Calling(nn.Module):
    """A network that computes as its run evaluated, for `update_bn`, which finds its layers and their modes."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.network, self._forward = forward.network, forward

    def forward(self, images: Tensor) -> Tensor:
        """Float32 logits."""
        return self._forward(images)


def _write(output: Path, state: dict[str, Any], mean: dict[str, Tensor], chosen: Sequence[Path]) -> None:
    tensors: dict[str, Any] = {}
    parts = {"model": split(mean, tensors)}
    said = {key: state[key] for key in _KEPT if key in state}
    unbounded = tuple(said.pop("unbounded", ()))
    said |= {"evaluation": None, "average_of": [str(path) for path in chosen], "parts": parts}
    try:
        write(Snapshot({"model": {name: t.contiguous() for name, t in tensors.items()}}, said, unbounded), output)
    except (OSError, SafetensorError) as error:
        raise UserError(f"-o {output}: was not written: {error}") from error

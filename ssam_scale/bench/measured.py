"""The times of a step's parts, measured on one machine and written down for another."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssam_scale.errors import UserError
from ssam_scale.perturbation import StagedModel
from ssam_scale.tracking.environment import hardware_tags

from .footprint import Activations
from .networks import Batch
from .parts import Parts, Work
from .predict import StageTimes, StepTimes


@dataclass(frozen=True)
class Measured:
    """What the cost model takes from a machine.

    Attributes:
        model: timm's name of the network.
        resolution: side of the images, pixels.
        precision: of passes.
        images: of the pass that was measured.
        weights: number of the network's weights.
        hardware: on what.
        times: seconds of the parts.
        activations: bytes that a forward keeps.
    """

    model: str
    resolution: int
    precision: str
    images: int
    weights: int
    hardware: str
    times: StepTimes
    activations: Activations

    def save(self, path: Path) -> None:
        """Write them as JSON.

        Raises:
            UserError: the file cannot be written.
        """
        try:
            path.write_text(json.dumps(asdict(self), indent=2) + "\n")
        except OSError as error:
            raise UserError(f"--save-times {path}: {error.strerror}") from error

    def check(self, expected: dict[str, Any], path: Path) -> None:
        """Compare with what is to be costed.

        Raises:
            UserError: it is something else that was measured.
        """
        for key, value in expected.items():
            found = len(self.times.stages) if key == "stages" else getattr(self, key)
            if found != value:
                raise UserError(f"--times {path}: {key} is {found} there and {value} in the configuration")


def load_times(path: Path) -> Measured:
    """What `Measured.save` wrote.

    Raises:
        UserError: the file cannot be read, or is not such a file.
    """
    try:
        found = json.loads(path.read_text())
        times, activations = found.pop("times"), found.pop("activations")
        stages = tuple(StageTimes(**stage) for stage in times.pop("stages"))
        return Measured(times=StepTimes(stages, **times), activations=Activations(**activations), **found)
    except OSError as error:
        raise UserError(f"--times {path}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"--times {path}: not a file that --save-times wrote: {error}") from error


def measure_times(
    work: Work, network: StagedModel, batch: Batch, optimizer: torch.optim.Optimizer, repeats: int
) -> StepTimes:
    """Medians of `repeats` measurements, after one that warms up.

    Args:
        work: what a pass computes.
        network: in training mode, and nobody else's; its weights change.
        batch: images and labels.
        optimizer: over all of its parameters.
        repeats: at least 1.
    """
    parts = Parts(work, network, batch, optimizer)
    for _ in range(repeats + 1):
        parts.measure()
    return parts.medians()


def measure_activations(work: Work, network: StagedModel, batch: Batch) -> Activations:
    """Bytes that a forward keeps, from forwards of half and of all of a batch: each storage once, weights not.

    Args:
        work: what a pass computes.
        network: in training mode.
        batch: of at least 4 images.
    """
    half = len(batch[0]) // 2
    few, many = (_kept_bytes(work, network, (batch[0][:n], batch[1][:n])) for n in (half, len(batch[0])))
    per_image = max(0.0, (many - few) / (len(batch[0]) - half))
    return Activations(max(0.0, many - per_image * len(batch[0])), per_image)


def _kept_bytes(work: Work, network: StagedModel, batch: Batch) -> int:
    own = {t.untyped_storage().data_ptr() for t in (*network.parameters(), *network.buffers(), *batch)}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = tensor  # alive, so that no other storage comes to lie there
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        work.loss_fn(network, batch)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def this_machine() -> str:
    """What `Measured.hardware` says of this one."""
    return str(hardware_tags()["hardware"])

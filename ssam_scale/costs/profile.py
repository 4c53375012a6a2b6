"""Measured times of a network's stages, of perturbing and of the base optimizer; saved for use on another machine."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ssam_scale.clock import clock_of
from ssam_scale.errors import UserError
from ssam_scale.folders import why_not_replaceable
from ssam_scale.perturbation import SparseSAM, StagedModel
from ssam_scale.tracking.environment import hardware_tags

from .compute import StageTimes, StepTimes
from .estimate import Activations

if TYPE_CHECKING:
    from ssam_scale.sharding.device import DeviceChoice

Batch = tuple[Tensor, Tensor]


# What the backward of a stage computes.
_BOTH, _NO_WEIGHTS, _NO_INPUT = "both", "no weights", "no input"


class Work(Protocol):
    """What a pass computes."""

    def loss_fn(self, forward: Callable[[Tensor], Tensor], batch: Batch) -> Tensor:
        """The mean loss, in the precision of a pass."""

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of forwards."""


class Parts:
    """Measures the parts of a step on a copy of the network.

    Args:
        work: what a pass computes.
        network: in training mode, and nobody else's.
        batch: images and labels.
        optimizer: the base optimizer, over all of the network's parameters.
    """

    def __init__(self, work: Work, network: StagedModel, batch: Batch, optimizer: torch.optim.Optimizer) -> None:
        self._work = work
        self._network = network
        self._batch = batch
        self._clock = clock_of(batch[0].device)
        self._optimizer = optimizer
        self._opt = SparseSAM(network, self._optimizer)
        self._weights = sum(p.numel() for p in network.parameters())
        self._measured: list[StepTimes] = []

    def measure(self) -> None:
        """Once more."""
        upstream: list[Tensor | None] = []
        both = self._pass(_BOTH, upstream)
        perturb = self._seconds(self._perturb)
        no_weights = self._pass(_NO_WEIGHTS, upstream)
        no_input = self._pass(_NO_INPUT, upstream)
        optimizer = self._seconds(self._step)
        stages = tuple(
            StageTimes(forward, backward, no_weights[i][1], no_input[i][1])
            for i, (forward, backward) in enumerate(both)
        )
        self._measured.append(StepTimes(stages, optimizer, perturb / self._weights))

    def medians(self) -> StepTimes:
        """Of all measurements but the first, which is a warm-up."""
        kept = self._measured[1:]

        def of(part: Callable[[StepTimes], float]) -> float:
            return statistics.median(part(times) for times in kept)

        stages = tuple(
            StageTimes(*(of(lambda t, i=i, k=k: dataclasses.astuple(t.stages[i])[k]) for k in range(4)))  # type: ignore[misc]
            for i in range(len(kept[0].stages))
        )
        return StepTimes(stages, of(lambda t: t.optimizer), of(lambda t: t.perturb))

    def _pass(self, computes: str, upstream: list[Tensor | None]) -> list[tuple[float, float]]:
        """Forward and backward of each stage by itself, on what the one before put out.

        Args:
            computes: which gradients.
            upstream: of each stage's output, its gradient; filled if both gradients are computed, else used, because
                without the gradients of inputs there is none.
        """
        clock, last = self._clock, len(self._network.stages) - 1
        for p in self._network.parameters():
            p.requires_grad_(computes != _NO_WEIGHTS)
        hidden, inputs, outputs, marks = self._batch[0], [], [], []
        for index in range(last + 1):
            x = hidden.detach().requires_grad_(computes != _NO_INPUT)

            def forward(x: Tensor, index: int = index) -> Tensor:
                hidden: Tensor = self._network(x, start=index, stop=index + 1)
                return hidden

            start = clock.mark()
            if index < last:
                with self._work.autocast():
                    hidden = forward(x)
            else:
                hidden = self._work.loss_fn(forward, (x, self._batch[1]))
            marks.append([start, clock.mark()])
            inputs.append(x)
            outputs.append(hidden)
        del hidden, x
        gradients: list[Tensor | None] = [None] * (last + 1) if computes == _BOTH else upstream
        for index in reversed(range(last + 1)):
            output, x, start = outputs.pop(), inputs.pop(), clock.mark()
            output.backward(gradients[index])
            marks[index] += [start, clock.mark()]
            if computes == _BOTH and index:
                gradients[index - 1] = x.grad
        if computes == _BOTH:
            upstream[:] = gradients
        for p in self._network.parameters():
            p.requires_grad_(True)
        clock.wait(marks[0][-1])
        return [(clock.seconds(a, b), clock.seconds(c, d)) for a, b, c, d in marks]

    def _seconds(self, work: Callable[[], None]) -> float:
        start = self._clock.mark()
        work()
        end = self._clock.mark()
        self._clock.wait(end)
        return self._clock.seconds(start, end)

    def _perturb(self) -> None:
        with self._opt.perturbed():
            pass

    def _step(self) -> None:
        self._optimizer.step()
        self._optimizer.zero_grad()


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
        activation_checkpointing: whether backwards compute their stages again, and forwards keep less for it.
        compile: whether the network was compiled.
    """

    model: str
    resolution: int
    precision: str
    images: int
    weights: int
    hardware: str
    times: StepTimes
    activations: Activations
    activation_checkpointing: bool = False
    compile: bool = False

    def save(self, path: Path) -> None:
        """Write them as JSON.

        Raises:
            UserError: the file cannot be written.
        """
        if (problem := why_not_replaceable(path)) is not None:
            raise UserError(f"--save-times {path}: {problem}")
        try:
            path.write_text(json.dumps(asdict(self), indent=2) + "\n")
        except OSError as error:
            raise UserError(f"--save-times {path}: {error.strerror}") from error

    def check(self, expected: dict[str, Any], path: Path, given_by: str = "--times") -> None:
        """Compare with what is to be costed.

        Args:
            expected: of the attributes.
            path: where it was read from.
            given_by: the option or key that names the file, in the words of the error.

        Raises:
            UserError: it is something else that was measured.
        """
        for key, value in expected.items():
            found = len(self.times.stages) if key == "stages" else getattr(self, key)
            if found != value:
                raise UserError(f"{given_by} {path}: {key} is {found} there and {value} in the configuration")


def load_times(path: Path, given_by: str = "--times") -> Measured:
    """What `Measured.save` wrote.

    Args:
        path: of the file.
        given_by: the option or key that names it, in the words of the error.

    Raises:
        UserError: the file cannot be read, or is not such a file.
    """
    try:
        found = json.loads(path.read_text())
        times, activations = found.pop("times"), found.pop("activations")
        stages = tuple(StageTimes(**stage) for stage in times.pop("stages"))
        return Measured(times=StepTimes(stages, **times), activations=Activations(**activations), **found)
    except OSError as error:
        raise UserError(f"{given_by} {path}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{given_by} {path}: not a file that --save-times wrote: {error}") from error


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


def this_machine(device: DeviceChoice = "auto") -> str:
    """What `Measured.hardware` says of this one, and of what was told to compute on this device."""
    return str(hardware_tags(device)["hardware"])

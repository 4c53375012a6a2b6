"""Measured times of a network's stages, of perturbing and of the base optimizer; saved for use on another machine."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
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

from .compute import PassTimes, StageTimes, StepTimes
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
        sizes: images of the passes that are measured beside those of the whole batch.
    """

    def __init__(
        self,
        work: Work,
        network: StagedModel,
        batch: Batch,
        optimizer: torch.optim.Optimizer,
        sizes: Iterable[int] = (),
    ) -> None:
        self._work = work
        self._network = network
        whole = len(batch[0])
        self._batches = [(batch[0][:size], batch[1][:size]) for size in sorted({*sizes, whole})]
        self._clock = clock_of(batch[0].device)
        self._optimizer = optimizer
        self._opt = SparseSAM(network, self._optimizer)
        self._weights = sum(p.numel() for p in network.parameters())
        self._measured: list[StepTimes] = []

    def measure(self) -> None:
        """Once more."""
        passes = tuple(self._stages(batch) for batch in self._batches)
        perturb = self._seconds(self._perturb)
        self._pass(self._batches[0], _BOTH, [])  # perturbing has dropped the gradients that the optimizer steps by
        optimizer = self._seconds(self._step)
        self._measured.append(StepTimes(passes, optimizer, perturb / self._weights, passes[-1].images))

    def medians(self) -> StepTimes:
        """Of all measurements but the first, which is a warm-up."""
        kept = self._measured[1:]
        passes = (tuple(each) for each in zip(*(times.passes for times in kept), strict=True))
        return StepTimes(
            tuple(PassTimes(same[0].images, _medians([times.stages for times in same])) for same in passes),
            statistics.median(times.optimizer for times in kept),
            statistics.median(times.perturb for times in kept),
            kept[0].images,
        )

    def _stages(self, batch: Batch) -> PassTimes:
        upstream: list[Tensor | None] = []
        both, no_weights, no_input = (
            self._pass(batch, computes, upstream) for computes in (_BOTH, _NO_WEIGHTS, _NO_INPUT)
        )
        stages = (
            StageTimes(forward, backward, no_weights[i][1], no_input[i][1])
            for i, (forward, backward) in enumerate(both)
        )
        return PassTimes(len(batch[0]), tuple(stages))

    def _pass(self, batch: Batch, computes: str, upstream: list[Tensor | None]) -> list[tuple[float, float]]:
        """Forward and backward of each stage by itself, on what the one before put out.

        Args:
            batch: images and labels.
            computes: which gradients.
            upstream: of each stage's output, its gradient; filled if both gradients are computed, else used, because
                without the gradients of inputs there is none.
        """
        clock, last = self._clock, len(self._network.stages) - 1
        self._optimizer.zero_grad()  # adding to gradients takes longer than leaving them, as an ascent does
        for p in self._network.parameters():
            p.requires_grad_(computes != _NO_WEIGHTS)
        hidden, inputs, outputs, marks = batch[0], [], [], []
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
                hidden = self._work.loss_fn(forward, (x, batch[1]))
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


def _medians(measured: Sequence[tuple[StageTimes, ...]]) -> tuple[StageTimes, ...]:
    """Of each part of each stage, over measurements."""
    return tuple(
        StageTimes(*map(statistics.median, zip(*map(dataclasses.astuple, same), strict=True)))
        for same in zip(*measured, strict=True)
    )


@dataclass(frozen=True)
class Measured:
    """What the cost model takes from a machine.

    Attributes:
        model: timm's name of the network.
        resolution: side of the images, pixels.
        precision: of passes.
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
    weights: int
    hardware: str
    times: StepTimes
    activations: Activations
    activation_checkpointing: bool = False
    compile: bool = False

    @property
    def images(self) -> int:
        """Of the largest pass that was measured."""
        return self.times.passes[-1].images

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
            found = len(self.times.passes[0].stages) if key == "stages" else getattr(self, key)
            if found != value:
                raise UserError(f"{given_by} {path}: {key} is {found} there and {value} in the configuration")


def load_times(path: Path, given_by: str = "--times") -> Measured:
    """What `Measured.save` wrote.

    Args:
        path: of the file.
        given_by: the option or key that names it, in the words of the error.

    Raises:
        UserError: the file cannot be read, or is not such a file, or one of an older version.
    """
    try:
        found = json.loads(path.read_text())
        times, activations = found.pop("times"), found.pop("activations")
        if "stages" in times:
            raise UserError(
                f"{given_by} {path}: an older version wrote it, which measured passes of one size only; make a new one "
                f"with `ssam-scale cost --config … --save-times {path}`"
            )
        passes = tuple(
            PassTimes(each["images"], tuple(StageTimes(**stage) for stage in each["stages"]))
            for each in times.pop("passes")
        )
        return Measured(times=StepTimes(passes, **times), activations=Activations(**activations), **found)
    except OSError as error:
        raise UserError(f"{given_by} {path}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{given_by} {path}: not a file that --save-times wrote: {error}") from error


def measure_times(
    work: Work,
    network: StagedModel,
    batch: Batch,
    optimizer: torch.optim.Optimizer,
    repeats: int,
    sizes: Iterable[int] = (),
) -> StepTimes:
    """Medians of `repeats` measurements, after one that warms up.

    Args:
        work: what a pass computes.
        network: in training mode, and nobody else's; its weights change.
        batch: images and labels.
        optimizer: over all of its parameters.
        repeats: at least 1.
        sizes: images of the passes that are measured beside those of the whole batch.
    """
    parts = Parts(work, network, batch, optimizer, sizes)
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

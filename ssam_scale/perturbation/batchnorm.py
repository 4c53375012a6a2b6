"""BatchNorm under two passes: which of them updates the running statistics.

One optimizer step runs two passes but sees one batch: the statistics are updated in the ascent pass, which is the one
at the weights that are evaluated and saved, and left alone in the descent pass at the perturbed weights. Where the
ascent sees a part of the batch only, or there is none, they are updated in the descent pass, which sees all of it.
Where both passes share a prefix, its statistics are updated once because it runs once. What a backward computes again,
for the activations that a forward did not keep, updates nothing.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .modules import every_module


def batchnorms(model: nn.Module) -> list[_BatchNorm]:
    """Every BatchNorm in `model`."""
    return [module for module in every_module(model) if isinstance(module, _BatchNorm)]


def frozen_statistics(model: nn.Module) -> AbstractContextManager[None]:
    """Leave running mean, variance and batch count of every BatchNorm in `model` untouched inside the context.

    Batches are still normalised by their own statistics where the layer is in training mode. This is momentum 0 without
    its side effect on `num_batches_tracked`, and it costs no arithmetic.
    """
    return _frozen(batchnorms(model))


@contextmanager
def _frozen(batchnorms: list[_BatchNorm]) -> Iterator[None]:
    # A layer in evaluation mode normalises by its running statistics, which it needs to keep seeing.
    layers = [vars(layer) for layer in batchnorms if layer.training and layer.track_running_stats]
    # Past `nn.Module.__setattr__`, which takes longer than the rest of this together.
    for attributes in layers:
        attributes["track_running_stats"] = False
    try:
        yield
    finally:
        for attributes in layers:
            attributes["track_running_stats"] = True


_Place = tuple[nn.Module, str]  # of a buffer
_Buffers = Mapping[_Place, tuple[Tensor, int]]  # with a number that rises when one is written to


class Statistics:
    """All that training forwards write to a model's buffers, which a step with two passes writes once.

    BatchNorm is told (`frozen_statistics`). Other modules (InstanceNorm, spectral normalization, running means of
    one's own) cannot be: what they have written in the second pass is put back. Only buffers that the forwards of this
    model have been seen to write to are copied for it.

    Args:
        model: whose.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._seen = self._now()[1]
        self._writers: set[_Place] | None = None  # of these buffers; None: nobody has looked yet

    def _now(self) -> tuple[list[_BatchNorm], dict[_Place, tuple[Tensor, int]]]:
        """Every BatchNorm; and every other module's buffers, with a number that rises when one is written to."""
        with_buffers = [module for module in every_module(self._model) if module._buffers]
        return [module for module in with_buffers if isinstance(module, _BatchNorm)], {
            (module, name): (buffer, buffer._version)
            for module in with_buffers
            if not isinstance(module, _BatchNorm)
            for name, buffer in module._buffers.items()
            if buffer is not None and not buffer.is_inference()
        }

    @contextmanager
    def frozen_at_first(self) -> Iterator[None]:
        """Nothing inside is left in the buffers. To be entered for the first pass, where the second writes to them."""
        (layers, now), seen = self._now(), self._seen
        if self._writers is not None:
            self._writers |= _changed(now, seen).keys()
        copied = {p: buffer for p, (buffer, _) in now.items() if self._writers is None or p in self._writers}
        before = {place: buffer.detach().clone() for place, buffer in copied.items()}
        try:
            with _frozen(layers):
                yield
        finally:
            written = {
                (module, name)
                for (module, name), buffer in copied.items()
                if module._buffers.get(name) is not buffer or buffer._version != now[module, name][1]
            }
            self._writers = written | (self._writers or set())
            with torch.no_grad():
                for module, name in written:
                    copied[module, name].copy_(before[module, name])
                    module._buffers[name] = copied[module, name]
            self._seen = self._now()[1]

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Nothing inside is left in the buffers. To be entered after the pass that does write to them."""
        (layers, now), seen = self._now(), self._seen
        written = _changed(now, seen)
        before = {place: buffer.detach().clone() for place, buffer in written.items()}
        try:
            with _frozen(layers):
                yield
        finally:
            with torch.no_grad():
                for (module, name), buffer in written.items():
                    buffer.copy_(before[module, name])
                    module._buffers[name] = buffer
            # What has come inside, or has been replaced there, is not seen by this, and counts as written next time.
            self._seen = {place: (buffer, buffer._version) for place, (buffer, _) in now.items()}


def _changed(now: _Buffers, seen: _Buffers) -> dict[_Place, Tensor]:
    """The buffers that have come, been replaced or been written to since."""
    return {
        place: buffer
        for place, (buffer, number) in now.items()
        if place not in seen or seen[place][0] is not buffer or seen[place][1] != number
    }


def repeating(layers: list[_BatchNorm]) -> AbstractContextManager[None]:
    """A forward inside normalises as one would now, when this is called, and updates no running statistics.

    The ascent may run a prefix whose statistics it updates, and the descent's backward compute it again, in which all
    statistics are frozen. Also what is saved for the backward is the same: a layer without running statistics would
    save less. A layer that normalises by its batch does not read them, so it is given empty ones to write to.

    Args:
        layers: every BatchNorm that the forward may run.
    """
    return _repeating([(layer, layer.track_running_stats) for layer in layers if layer.training])


_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@contextmanager
def _repeating(tracked: list[tuple[Any, bool]]) -> Iterator[None]:
    # In a descent, where all of them are frozen, there is nothing to do; and each stage that is computed again asks.
    before = [
        (vars(layer), tracks, layer.track_running_stats, [layer._buffers[name] for name in _STATISTICS])
        for layer, tracks in tracked
        if tracks or layer.track_running_stats
    ]
    for attributes, tracks, _, statistics in before:
        attributes["track_running_stats"] = tracks
        if tracks:
            attributes["_buffers"].update(zip(_STATISTICS, map(torch.empty_like, statistics), strict=True))
    try:
        yield
    finally:
        for attributes, _, tracked_before, statistics in before:
            attributes["track_running_stats"] = tracked_before
            attributes["_buffers"].update(zip(_STATISTICS, statistics, strict=True))


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put every module of `model` in evaluation mode, and each back into the mode it was in."""
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True

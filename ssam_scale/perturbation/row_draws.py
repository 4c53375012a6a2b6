"""What layers draw for each image, by the image's place in the batch of all processes.

Dropout and stochastic depth that draw from a process's generator train another network for each number of processes.
Layers that draw by row go by hashes of seed, layer, step and row: of an image they drop the same whichever process
sees it, in whichever micro-batch, and in both passes, also where one of them sees some of the images.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ssam_scale.sharding.process_group import ProcessGroup

from .modules import every_module
from .rng import hashed, row_bits, signed, spread


class DrawsByRow(nn.Module):
    """A layer that drops by the places of images in the batch of all processes, in a forward that is told them.

    Passes that a step runs itself (`opt.step(loss_fn, *batches)`) tell them. In any other forward, and where the first
    dimension of what it is called with is no multiple of the images, the layer draws as torch and timm do.

    Attributes:
        stream: 64 bits, of the run and the layer.
        calls: how often a forward of the network calls the layer. Each of the calls draws other numbers.
        bits: uniform int32 of shape (calls, images), of the images that the forward sees; None: nobody has told.
    """

    stream: int = 0
    calls: int = 1
    bits: Tensor | None = None
    _call: int = 0  # that comes next

    def tell(self, bits: Tensor | None) -> None:
        """A forward of the images of these bits is next."""
        vars(self).update(bits=bits, _call=0)  # `Module.__setattr__` takes ten times as long

    def drawn(self, x: Tensor, count: int = 1) -> Tensor | None:
        """Uniform int32 of shape (rows, count): so many numbers for each row of `x`; None: nobody has told its place.

        An image may have several rows, one after the other, as windows are.
        """
        if self.bits is None or not x.numel() or len(x) % self.bits.shape[1]:
            return None
        bits = self.bits[self._call]
        if self.calls > 1:
            self._call = (self._call + 1) % self.calls
        of_image = len(x) // len(bits) * count
        return (bits[:, None] if of_image == 1 else spread(bits, of_image)).view(len(x), count)


class RowDraws:
    """Tells the layers of a network that draw by row which images a forward sees.

    The bits of all layers are computed together, in one tensor for each number of images, whose place in memory stays:
    what was compiled or captured with it reads what is written there later. Nothing waits for the device.

    Args:
        network: whose layers; if it has none, nothing happens.
        device: where it computes.
        group: the processes that a batch is split over, in the order of their parts.
    """

    def __init__(self, network: nn.Module, device: torch.device, group: ProcessGroup) -> None:
        self._layers = [module for module in every_module(network) if isinstance(module, DrawsByRow)]
        self._device, self._group = device, group
        self._states: Tensor | None = None  # of each call of each layer
        self._bits: dict[int, Tensor] = {}  # of so many images
        self._of: dict[int, tuple[int, int] | None] = {}  # the step and the first row of these, where others follow it

    def __bool__(self) -> bool:
        return bool(self._layers)

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Surrounds a pass, after which layers know no place any more."""
        try:
            yield
        finally:
            for layer in self._layers:
                layer.tell(None)

    @torch.no_grad()
    def tell(self, step: int, before: int, images: int, chosen: slice | Tensor) -> None:
        """The next forward is of this process's micro-batch, or of some of its images.

        Args:
            step: of the run.
            before: images of the step that the process has had in earlier micro-batches.
            images: of the micro-batch.
            chosen: which of them the forward sees, from the first on or by their indices.
        """
        first = before * self._group.size + self._group.rank * images
        count = len(range(images)[chosen]) if isinstance(chosen, slice) else len(chosen)
        of = (step, first) if isinstance(chosen, slice) else None
        if of is None or self._of.get(count) != of:
            rows = torch.arange(first, first + images, device=self._device)[chosen]
            bits = row_bits(self._every_state() ^ signed(hashed(step, 0)), rows)
            self._bits[count] = self._bits[count].copy_(bits) if count in self._bits else bits
            self._of[count] = of
        of_layers = self._bits[count].split([layer.calls for layer in self._layers])
        for layer, bits in zip(self._layers, of_layers, strict=True):
            layer.tell(bits)

    def _every_state(self) -> Tensor:
        if self._states is None:
            states = [signed(hashed(layer.stream, call)) for layer in self._layers for call in range(layer.calls)]
            self._states = torch.tensor(states, device=self._device)
        return self._states

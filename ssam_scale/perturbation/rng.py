"""Random numbers of a step: the generator state that both passes start from, and numbers that are hashes of a seed.

Both passes of a step draw the same random numbers. Dropout and stochastic depth so drop the same in both, and the
ascent climbs the very function whose gradient is taken at the top, as in the SAM paper's own code, which gives both
passes one key (arXiv 2010.01412). It also makes a step's result independent of whether a prefix is shared, and of the
number of passes: a step draws as much as one pass. Layers that draw by row (`row_draws`) need no generator for that.

Random scores, seeds of samples and bits of rows are hashes by SplitMix64 (doi 10.1145/2660193.2660195): functions of
what they are for, so that they are the same on any number of processes.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor, arange, int32, int64, nn


@dataclass(frozen=True)
class RandomState:
    """The state of torch's generators: the CPU's, and that of one other device; and of Python's and NumPy's.

    By these two many a loss function mixes samples, and many a model leaves layers out.
    """

    device: torch.device
    cpu: Tensor
    own: Tensor | None
    python: Any
    numpy: Any

    @staticmethod
    def now(device: torch.device) -> RandomState:
        """The present state. Does not synchronise with `device`: its generator's state is kept on the host."""
        own = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)
        numpys = numpy.random.get_state(legacy=True)
        if isinstance(numpys, tuple):  # `set_state` takes its numbers one by one, from a list in a tenth of the time
            numpys = (numpys[0], numpys[1].tolist(), *numpys[2:])
        return RandomState(device, torch.get_rng_state(), own, random.getstate(), numpys)

    def restore(self) -> None:
        """Set the generators back to this state."""
        torch.set_rng_state(self.cpu)
        random.setstate(self.python)
        numpy.random.set_state(self.numpy)
        if self.own is not None:
            torch.get_device_module(self.device).set_rng_state(self.own, self.device)


class FirstForward:
    """Forward pre-hook that notes the state of the generators when the first training forward of a step begins.

    Whoever runs both passes by hand says nothing when the first one begins. A copy of the module gets a hook of its
    own, and what is compiled runs none.

    Args:
        device: of the generator beside the CPU's.

    Attributes:
        state: at the first forward since `forget`; None: there has been none.
        forwards: how many there have been since `forget` or `cleared`.
        total: how many there have been at all.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.state: RandomState | None = None
        self.forwards = self.total = 0
        self._cleared = self._asleep = False

    @contextmanager
    def asleep(self) -> Iterator[None]:
        """Forwards inside are of a step that runs both passes itself, and are not noticed."""
        self._asleep = True
        try:
            yield
        finally:
            self._asleep = False

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        """Torch's, before `module.forward`."""
        if self._asleep or torch.compiler.is_compiling() or not (module.training and torch.is_grad_enabled()):
            return
        self.forwards += 1
        self.total += 1
        # A forward whose gradients came after the clearing belongs to this step.
        if self.state is None or (self._cleared and all(p.grad is None for p in module.parameters())):
            self.state = RandomState.now(self.device)
        self._cleared = False

    def forget(self) -> None:
        """The next forward is the first of a step."""
        self.state, self.forwards, self._cleared = None, 0, False

    def cleared(self) -> None:
        """Gradients have been cleared, by some people before a step's first forward and by others after it."""
        self.forwards, self._cleared = 0, True

    def __reduce__(self) -> tuple[type[FirstForward], tuple[torch.device]]:
        return FirstForward, (self.device,)


def seed_step(device: torch.device, seed: int, epoch: int, step: int, rank: int) -> None:
    """Set torch's generators, the CPU's and the device's, Python's and NumPy's to a function of a step and a process.

    What is drawn in a step so depends on nothing that was drawn before it: no generator's state has to be saved for a
    run to be resumed at any step. Takes some 25 µs of the host, a tenth of `torch.manual_seed`.

    Args:
        device: where the process computes.
        seed: of the run.
        epoch: from 0.
        step: of the epoch, from 0.
        rank: of the process.
    """
    state = seed
    for index in (epoch, step, rank):
        state = hashed(state, index)
    torch.random.default_generator.manual_seed(state)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(state)
    random.seed(state)
    numpy.random.seed(state % 2**32)


_TOGETHER = 2**20  # numbers whose int64 state is in memory at once: 8 MiB

# The step of the counter, and the shifts and factors of the finaliser, which has no last factor.
_STEP = 0x9E3779B97F4A7C15
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))


def hashed(seed: int, index: int) -> int:
    """A 64-bit hash of a seed and an index."""
    bits = seed
    for word in (0, index):
        bits = (bits + (word + 1) * _STEP) % 2**64
        for shift, factor in _MIX:
            bits = ((bits ^ (bits >> shift)) * factor) % 2**64
    return bits


def uniform_(out: Tensor, start: int, state: int) -> None:
    """Overwrite `out` with uniform numbers in [0, 1): the 24 highest bits of outputs of SplitMix64.

    Args:
        out: contiguous float32 of shape (n,), on any device.
        start: number of the first output, from 0; the others follow.
        state: 64 bits that the generator starts from.
    """
    for begin in range(0, len(out), _TOGETHER):
        part = out[begin : begin + _TOGETHER]
        first = start + begin + 1
        # int64 stands for unsigned integers: sums and products wrap in the same way.
        bits = arange(first, first + len(part), dtype=int64, device=out.device)
        bits.mul_(signed(_STEP)).add_(signed(state))
        mixed_(bits)
        part.copy_(_shifted(bits, 40)).mul_(2.0**-24)


def mixed_(bits: Tensor) -> Tensor:
    """SplitMix64's finaliser in place: int64, which stands for unsigned integers."""
    for shift, factor in _MIX:
        bits.bitwise_xor_(_shifted(bits, shift)).mul_(signed(factor))
    return bits


def row_bits(states: Tensor, rows: Tensor) -> Tensor:
    """The 32 highest bits of the outputs of SplitMix64 that start from several states, int32 of shape (states, rows).

    Args:
        states: int64 of shape (states,).
        rows: numbers of the outputs, from 0, int64 of shape (rows,).
    """
    return (mixed_(states[:, None] + (rows + 1) * signed(_STEP)) >> 32).to(int32)


# Shifts and factors of the 32-bit finaliser with the least bias that Chris Wellons' search has found (lowbias32).
_MIX_32 = ((16, 0x7FEB352D), (15, 0x846CA68B - 2**32))


def spread(bits: Tensor, count: int) -> Tensor:
    """32 bits for each of `count` elements of each row, from 32 bits of the row; int32 of shape (rows, count).

    In int32, of which a processor computes several at once. Numbers of elements are hashed once, whatever the rows, so
    that to the rest comes what is random already: of the finaliser one shift between its factors is enough, because
    what is asked of the result is whether it is below a number, which the highest bits decide.

    Args:
        bits: uniform int32 of shape (rows,).
        count: of elements.
    """
    elements = arange(count, dtype=int32, device=bits.device)
    for shift, factor in _MIX_32:
        elements = (elements ^ ((elements >> shift) & (2 ** (32 - shift) - 1))) * factor
    elements = elements ^ ((elements >> 16) & 0xFFFF)
    (_, first), (shift, second) = _MIX_32
    mixed = (elements ^ bits[:, None]).mul_(first)
    mixed.bitwise_xor_((mixed >> shift).bitwise_and_(2 ** (32 - shift) - 1))
    return mixed.mul_(second)


def _shifted(bits: Tensor, by: int) -> Tensor:
    """Shifted to the right as unsigned integers are: zeros come in."""
    return (bits >> by) & (2 ** (64 - by) - 1)


def signed(bits: int) -> int:
    """The int64 of the same 64 bits."""
    return bits - 2**64 if bits >= 2**63 else bits

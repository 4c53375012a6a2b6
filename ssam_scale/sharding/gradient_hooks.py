"""Hooks that hand over gradients as the backward makes them, before a backend reduces them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

OnGradient: TypeAlias = Callable[[int, Tensor], None]

_ALIGNMENT = 64  # bytes: where torch's allocators begin


def dense(gradient: Tensor) -> Tensor:
    """The gradient itself, if it can be scaled with others.

    Raises:
        ValueError: it is sparse.
    """
    if gradient.layout is not torch.strided:
        raise ValueError(
            f"a weight of shape {tuple(gradient.shape)} got a sparse gradient, which cannot be scaled with the others; "
            "call embedding with sparse=False"
        )
    return gradient


@contextmanager
def aligned_storage(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Each of `tensors` begins at an aligned address inside, in a copy if need be, and in its old memory afterwards.

    Kernels may add in another order where an operand begins elsewhere, as a view of a flat buffer does.

    Args:
        tensors: only read inside; their addresses are not what they are outside.
    """
    moved = [(t, t.data) for t in tensors if t.numel() and t.data_ptr() % _ALIGNMENT]
    try:
        for t, old in moved:
            t.data = old.clone()
        yield
    finally:
        for t, old in moved:
            t.data = old


@contextmanager
def removing(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Hooks that are registered inside, and removed on the way out whatever happens."""
    registered = list(handles)
    try:
        yield
    finally:
        for handle in registered:
            handle.remove()


@contextmanager
def divert_gradients(leaves: Iterable[Tensor], on_gradient: OnGradient) -> Iterator[None]:
    """`on_gradient(index, gradient)` instead of accumulating in `.grad` of each of `leaves`, which stays None.

    A backend that looks for gradients after the backward finds none and reduces nothing.

    Args:
        leaves: that require a gradient and have none.
        on_gradient: is given the gradient for good.
    """

    def hook(index: int, leaf: Tensor) -> None:
        assert leaf.grad is not None
        gradient, leaf.grad = leaf.grad, None
        on_gradient(index, dense(gradient))

    with removing(leaf.register_post_accumulate_grad_hook(partial(hook, i)) for i, leaf in enumerate(leaves)):
        yield


@contextmanager
def observe_gradients(leaves: Iterable[Tensor], on_gradient: OnGradient) -> Iterator[None]:
    """`on_gradient(index, gradient)` before a gradient is accumulated and the backend reduces it as always.

    Args:
        leaves: that require a gradient.
        on_gradient: must not write to the gradient.
    """

    def hook(index: int, gradient: Tensor) -> None:
        with torch.no_grad():
            on_gradient(index, gradient)

    with removing(leaf.register_hook(partial(hook, i)) for i, leaf in enumerate(leaves)):
        yield

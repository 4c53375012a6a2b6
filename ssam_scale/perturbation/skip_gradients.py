"""Backward passes that skip weight gradients: of whole parameters, and of rows of linear layers and convolutions."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from ssam_scale.masks import Rows

from .staged_model import modules_in

# Above this share of a layer's rows, moving the gradient of the kept ones together costs more than it saves. On a GPU
# it always does: half of all rows took 14 ms a step more than all of them, on ResNet-50 and ViT-B (an H100, batch 128).
_MOST_ROWS = {"cpu": 0.9, "cuda": 0.0}


@contextmanager
def without_gradient(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Forwards inside keep no graph towards `parameters`, so their gradient is neither computed nor saved for.

    Raises:
        ValueError: what others need is lost with it, because a layer behind them is checkpointed reentrantly.
    """
    trained = [p for p in parameters if p.requires_grad]
    for p in trained:
        p.requires_grad_(False)
    try:
        with _reentrance_told() if trained else nullcontext():
            yield
    finally:
        for p in trained:
            p.requires_grad_(True)


@contextmanager
def _reentrance_told() -> Iterator[None]:
    """Within the `with`, a reentrant checkpoint of layers that are trained refuses inputs without a gradient.

    It would compute none of these layers, with a warning that many turn off: torch's, whose place this takes.
    """
    own = torch.utils.checkpoint.check_backward_validity

    def check(inputs: Iterable[Any]) -> None:
        if any(x.requires_grad for x in inputs if isinstance(x, Tensor)):
            return
        function = sys._getframe(1).f_locals.get("run_function")
        held = list(modules_in(function, set()))
        if not held or any(p.requires_grad for module in held for p in module.parameters()):
            name = type(held[0]).__name__ if held else "function"
            raise ValueError(
                f"a {name} is checkpointed reentrantly, which computes no gradient of its weights where its input has "
                "none, and the ascent computes none of what is not perturbed before it: use use_reentrant=False, or no "
                "checkpointing"
            )

    torch.utils.checkpoint.check_backward_validity = check
    try:
        yield
    finally:
        torch.utils.checkpoint.check_backward_validity = own


def row_layers(network: nn.Module) -> dict[int, nn.Module]:
    """The layers whose weight's gradient can be computed for some rows only, by identity of the weight.

    Linear layers and convolutions of torch's own, not subclasses, whose forward may be another one; padded with zeros;
    not grouped, or by channel; with a weight that no other module uses.
    """
    users: dict[int, list[nn.Module]] = {}
    for module in network.modules():
        for p in module._parameters.values():
            if p is not None:
                users.setdefault(id(p), []).append(module)
    return {key: modules[0] for key, modules in users.items() if len(modules) == 1 and _knows(modules[0], key)}


def _knows(layer: Any, weight: int) -> bool:
    if type(layer) not in _BY_ROWS or id(layer.weight) != weight:
        return False
    if type(layer) is nn.Linear:
        return True
    plain = layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    by_channel = layer.groups == layer.in_channels == layer.out_channels
    return bool(plain and (layer.groups == 1 or by_channel))


def skips_rows(layer: nn.Module, rows: Rows) -> bool:
    """Whether `only_rows` makes a layer of `row_layers` compute the gradient of `rows` alone: where that saves time.

    A layer whose forward somebody has replaced keeps it.
    """
    return rows.kept_share <= _MOST_ROWS.get(rows.device.type, 0.0) and "forward" not in vars(layer)


@contextmanager
def only_rows(layers: Mapping[str, nn.Module], rows: Mapping[str, Rows]) -> Iterator[None]:
    """Backwards inside compute the gradient of `rows` of a layer's weight; that of the other rows is zero.

    What is computed is the same to the last bit or two: a matrix product of fewer rows may add in another order. Code
    that is compiled computes all rows.

    Args:
        layers: of `row_layers`, by name of their weight.
        rows: by name of the weight; of layers where `skips_rows`.
    """
    changed: list[tuple[Any, type[nn.Module]]] = []
    for name, part in rows.items():
        layer: Any = layers[name]
        changed.append((layer, type(layer)))
        layer._perturbed_rows = part
        # Its class and not its forward: `torch.compile` asks for a module's class, the same in every block and step,
        # and for the identity of a function, which made here would be another each time, and compiled anew.
        layer.__class__ = _BY_ROWS[type(layer)]
    try:
        yield
    finally:
        for layer, own in changed:
            layer.__class__ = own
            del layer._perturbed_rows


class _ByRows(nn.Module):
    """The class of a layer during an ascent that needs the gradient of some rows of its weight only."""

    _perturbed_rows: Rows

    def forward(self, x: Tensor) -> Tensor:
        # What is compiled may not look at the rows: it would be compiled for these and no others.
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            result: Tensor = super().forward(x)
            return result
        return _by_rows(self, self._perturbed_rows.kept, x)


def _by_rows(layer: Any, kept: Tensor, x: Tensor) -> Tensor:
    operands = _as_autocast(x, layer.weight, layer.bias)
    if isinstance(layer, nn.Linear):
        return _Linear.apply(*operands, kept)
    how = (layer.stride, layer.padding, layer.dilation, layer.groups)
    return _Convolution.apply(*operands, kept, how)


_BY_ROWS: dict[type[nn.Module], type[nn.Module]] = {
    layer: type(f"{layer.__name__}ByRows", (_ByRows, layer), {})
    for layer in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
}


def _as_autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """What an operator that autocast runs in low precision is given."""
    kind = next(t for t in tensors if t is not None).device.type
    if not torch.is_autocast_enabled(kind):
        return list(tensors)
    dtype = torch.get_autocast_dtype(kind)
    return [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors]


def _spread(rows: Tensor, kept: Tensor, like: Tensor) -> Tensor:
    """`rows` in their places in a tensor shaped like `like`, and zeros."""
    return torch.zeros_like(like).index_copy_(0, kept, rows)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, kept: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, kept)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, kept = ctx.saved_tensors
        [g] = upstream
        flat = g.reshape(-1, g.shape[-1])
        of_x = g @ weight if ctx.needs_input_grad[0] else None
        rows = flat.index_select(1, kept).t() @ x.reshape(-1, x.shape[-1])
        of_bias = flat.sum(0) if ctx.needs_input_grad[2] else None
        return of_x, _spread(rows, kept, weight), of_bias, None


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, kept: Tensor, how: Any) -> Tensor:
        ctx.save_for_backward(x, weight, kept)
        ctx.how = how
        stride, padding, dilation, groups = how
        none = (0,) * len(stride)
        return torch.convolution(x, weight, bias, stride, padding, dilation, False, none, groups)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, kept = ctx.saved_tensors
        [g] = upstream
        stride, padding, dilation, groups = ctx.how
        none = [0] * len(stride)

        def gradients(g: Tensor, x: Tensor, weight: Tensor, groups: int, wanted: list[bool]) -> list[Tensor | None]:
            sizes = [weight.shape[0]]
            return list(
                torch.ops.aten.convolution_backward(
                    g, x, weight, sizes, stride, padding, dilation, False, none, groups, wanted
                )
            )

        of_x, of_bias = None, None
        if ctx.needs_input_grad[0]:
            of_x = gradients(g, x, weight, groups, [True, False, False])[0]
        if ctx.needs_input_grad[2]:
            of_bias = g.sum([0, *range(2, g.ndim)])
        by_channel = groups > 1
        seen = x.index_select(1, kept) if by_channel else x
        g_rows, w_rows = g.index_select(1, kept), weight.index_select(0, kept)
        rows = gradients(g_rows, seen, w_rows, len(kept) if by_channel else 1, [False, True, False])[1]
        assert rows is not None
        return of_x, _spread(rows, kept, weight), of_bias, None, None

"""Layers that drop something at random, by the place of an image in the batch of all processes."""

from __future__ import annotations

from collections import Counter

import torch
from timm.layers import DropPath, PatchDropout, PatchDropoutWithIndices
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from ssam_scale.perturbation.batchnorm import evaluation_mode
from ssam_scale.perturbation.rng import hashed
from ssam_scale.perturbation.row_draws import DrawsByRow


def drop_by_row(model: nn.Module, seed: int, inputs: Tensor) -> None:
    """Let the layers of a model that drop at random draw by the place of an image in the batch of all processes.

    A step of `SparseSAM.step(loss_fn, *batches)` then drops the same of each image however many processes and
    micro-batches share the batch. In other forwards these layers draw from torch's generator, as they did. They are
    those of `torch.nn.Dropout`'s family, timm's `DropPath` and `PatchDropout`, torchvision's `StochasticDepth` by row,
    and the dropout before the classifier that timm's convolutional networks call as a function. What else is drawn by
    functions stays each process's own, that in attention (timm's `attn_drop_rate`) among it.

    The layers stay the objects that they are, and names stay. To be called before `SparseSAM` is made.

    Args:
        model: changed in place.
        seed: of the run.
        inputs: what the model takes; runs through it once, in evaluation mode, to count how often a layer is called.
    """
    give_layer_to_classifier(model)
    layers = [
        m for m in model.modules() if type(m) in _BY_ROW and _rate(m) > 0.0 and getattr(m, "mode", "row") == "row"
    ]
    calls: Counter[nn.Module] = Counter()
    hooks = [layer.register_forward_pre_hook(lambda module, _: calls.update([module])) for layer in layers]
    try:
        with torch.no_grad(), evaluation_mode(model):
            model(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    for number, layer in enumerate(layers):
        layer.__class__ = _BY_ROW[type(layer)]  # the same object, which stages and hooks have
        assert isinstance(layer, DrawsByRow)
        layer.stream, layer.calls = hashed(seed, number), max(1, calls[layer])


def _rate(layer: nn.Module) -> float:
    """The probability of what `layer` drops."""
    return next(getattr(layer, name) or 0.0 for name in ("p", "drop_prob", "prob") if hasattr(layer, name))


def _kept(bits: Tensor, rate: float) -> Tensor:
    """False with a probability of `rate`, which is below 1, by uniform int32 numbers."""
    return bits >= min(round(rate * 2**32), 2**32 - 1) - 2**31


class _Drops(DrawsByRow):
    """Zeroes what it draws, and makes up for it in the rest."""

    def _scaled(self, x: Tensor, bits: Tensor, rate: float, *, scale: bool = True, inplace: bool = False) -> Tensor:
        """What `x` becomes by `bits` of a shape that broadcasts to its own."""
        factor = _kept(bits, rate).to(x.dtype)
        if scale:
            factor.div_(1.0 - rate)
        return x.mul_(factor) if inplace else x * factor


class RowDropout(_Drops, nn.Dropout):
    """Dropout by row."""

    def forward(self, x: Tensor) -> Tensor:
        """Torch's."""
        if not self.training or self.p in (0.0, 1.0) or (bits := _of_elements(self, x)) is None:
            return super().forward(x)
        return self._scaled(x, bits, self.p, inplace=self.inplace)


class _RowFeatureDropout(_Drops):
    """Dropout of whole channels by row; without a dimension of images as torch has it."""

    spatial: int
    p: float
    inplace: bool

    def forward(self, x: Tensor) -> Tensor:
        """Torch's."""
        batched = x.ndim == self.spatial + 2
        if not self.training or self.p in (0.0, 1.0) or not batched or (bits := _of_channels(self, x)) is None:
            result: Tensor = super().forward(x)
            return result
        return self._scaled(x, bits, self.p, inplace=self.inplace)


class RowDropout1d(_RowFeatureDropout, nn.Dropout1d):
    """Dropout of channels of a sequence by row."""

    spatial = 1


class RowDropout2d(_RowFeatureDropout, nn.Dropout2d):
    """Dropout of feature maps by row."""

    spatial = 2


class RowDropout3d(_RowFeatureDropout, nn.Dropout3d):
    """Dropout of volumes by row."""

    spatial = 3


# What SELU goes to far below 0, which takes the place of what is dropped (arXiv 1706.02515, appendix A3).
_ALPHA = -1.7580993408473766


def _alpha_dropped(x: Tensor, bits: Tensor, rate: float, inplace: bool) -> Tensor:
    """`x` after alpha dropout, which keeps mean 0 and variance 1."""
    dropped = ~_kept(bits, rate)
    scale = ((1.0 - rate) * (1.0 + rate * _ALPHA**2)) ** -0.5
    result = x.masked_fill_(dropped, _ALPHA) if inplace else x.masked_fill(dropped, _ALPHA)
    return result.mul_(scale).add_(-scale * _ALPHA * rate)


class RowAlphaDropout(DrawsByRow, nn.AlphaDropout):
    """Alpha dropout by row."""

    def forward(self, x: Tensor) -> Tensor:
        """Torch's."""
        if not self.training or self.p in (0.0, 1.0) or (bits := _of_elements(self, x)) is None:
            return super().forward(x)
        return _alpha_dropped(x, bits, self.p, self.inplace)


class RowFeatureAlphaDropout(DrawsByRow, nn.FeatureAlphaDropout):
    """Alpha dropout of whole channels by row."""

    def forward(self, x: Tensor) -> Tensor:
        """Torch's."""
        if not self.training or self.p in (0.0, 1.0) or x.ndim < 2 or (bits := _of_channels(self, x)) is None:
            return super().forward(x)
        return _alpha_dropped(x, bits, self.p, self.inplace)


class RowDropPath(_Drops, DropPath):
    """Stochastic depth by row."""

    drop_prob: float
    scale_by_keep: bool

    def forward(self, x: Tensor) -> Tensor:
        """timm's."""
        if not self.training or self.drop_prob in (0.0, 1.0) or (bits := _of_rows(self, x)) is None:
            result: Tensor = super().forward(x)
            return result
        return self._scaled(x, bits, self.drop_prob, scale=self.scale_by_keep)


class RowStochasticDepth(_Drops, StochasticDepth):
    """torchvision's stochastic depth by row."""

    p: float

    def forward(self, x: Tensor) -> Tensor:
        """torchvision's."""
        if not self.training or self.p in (0.0, 1.0) or (bits := _of_rows(self, x)) is None:
            result: Tensor = super().forward(x)
            return result
        return self._scaled(x, bits, self.p)


class _DropsPatches(DrawsByRow):
    """Leaves out patches, the tokens behind a prefix."""

    prob: float
    num_prefix_tokens: int
    ordered: bool

    def _found(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """The prefix and the patches that are kept, and which these are; None: as timm has it."""
        if not self.training or not self.prob:
            return None
        prefix, patches = x.split([self.num_prefix_tokens, x.shape[1] - self.num_prefix_tokens], dim=1)
        count = patches.shape[1]
        if (bits := self.drawn(patches, count)) is None:
            return None
        kept = bits.argsort(dim=1)[:, : max(1, int(count * (1.0 - self.prob)))]
        if self.ordered:
            kept = kept.sort(dim=1).values
        return torch.cat([prefix, patches.take_along_dim(kept[:, :, None], dim=1)], dim=1), kept


class RowPatchDropout(_DropsPatches, PatchDropout):
    """Dropout of patches by row."""

    def forward(self, x: Tensor) -> Tensor:
        """timm's."""
        if (found := self._found(x)) is None:
            result: Tensor = super().forward(x)
            return result
        return found[0]


class RowPatchDropoutWithIndices(_DropsPatches, PatchDropoutWithIndices):
    """Dropout of patches by row, which says which it keeps."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """timm's."""
        if (found := self._found(x)) is None:
            result: tuple[Tensor, Tensor | None] = super().forward(x)
            return result
        return found


def _of_rows(layer: DrawsByRow, x: Tensor) -> Tensor | None:
    """A number for each row, of a shape that broadcasts to that of `x`."""
    bits = layer.drawn(x)
    return None if bits is None else bits.view(-1, *[1] * (x.ndim - 1))


def _of_channels(layer: DrawsByRow, x: Tensor) -> Tensor | None:
    """A number for each channel of each row, of a shape that broadcasts to that of `x`."""
    bits = layer.drawn(x, x.shape[1])
    return None if bits is None else bits.view(*x.shape[:2], *[1] * (x.ndim - 2))


def _of_elements(layer: DrawsByRow, x: Tensor) -> Tensor | None:
    """A number for each element."""
    bits = layer.drawn(x, x.shape[1:].numel()) if x.ndim else None
    return None if bits is None else bits.view(x.shape)


_BY_ROW: dict[type[nn.Module], type[DrawsByRow]] = {
    nn.Dropout: RowDropout,
    nn.Dropout1d: RowDropout1d,
    nn.Dropout2d: RowDropout2d,
    nn.Dropout3d: RowDropout3d,
    nn.AlphaDropout: RowAlphaDropout,
    nn.FeatureAlphaDropout: RowFeatureAlphaDropout,
    DropPath: RowDropPath,
    PatchDropout: RowPatchDropout,
    PatchDropoutWithIndices: RowPatchDropoutWithIndices,
    StochasticDepth: RowStochasticDepth,
}
"""By exact class: a subclass may do something else."""

_CLASSIFIERS = {
    "ResNet": "fc",
    "SENet": "last_linear",
    "Xception": "fc",
    "DPN": "classifier",
    "EfficientNet": "classifier",
    "FasterNet": "classifier",
    "GhostNet": "classifier",
    "LCNetV2": "classifier",
    "LowFormer": "classifier",
    "MobileNetV3": "classifier",
    "MobileNetV5": "classifier",
    "RepGhostNet": "classifier",
    "SHViT": "head",
    "StarNet": "head",
}
"""timm's classes that drop what goes into their classifier by a function, at the rate `drop_rate`; and its name."""


class _Before:
    """Forward pre-hook that runs a layer on what a module is called with; one object, so that copies have their own."""

    def __init__(self, layer: nn.Module) -> None:
        self._layer = layer

    def __call__(self, module: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        """Torch's, before `module.forward`."""
        result: Tensor = self._layer(inputs[0])
        return result


def give_layer_to_classifier(model: nn.Module) -> None:
    """Where a model of timm's calls dropout before its classifier as a function, have a layer do it.

    Args:
        model: changed in place; its forward draws and computes what it did.
    """
    timms = type(model).__module__.partition(".")[0] == "timm"
    name, rate = _CLASSIFIERS.get(type(model).__name__) if timms else None, getattr(model, "drop_rate", 0.0)
    if name is None or not rate:
        return
    model.drop_rate = 0.0  # type: ignore[assignment]
    layer = nn.Dropout(float(rate)).train(model.training)
    model.add_module("classifier_drop", layer)
    getattr(model, name).register_forward_pre_hook(_Before(layer))

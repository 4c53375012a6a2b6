"""BatchNorm under two passes: which of them updates the running statistics.

One optimizer step runs two passes but sees one batch: the statistics are updated in the ascent pass, which is the one
at the weights that are evaluated and saved, and left alone in the descent pass at the perturbed weights. Where both
passes share a prefix, its statistics are updated once because it runs once.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Leave running mean, variance and batch count of every BatchNorm in `model` untouched inside the context.

    Batches are still normalised by their own statistics where the layer is in training mode. This is momentum 0 without
    its side effect on `num_batches_tracked`, and it costs no arithmetic.
    """
    # A layer in evaluation mode normalises by its running statistics, which it needs to keep seeing.
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True


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

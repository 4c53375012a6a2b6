"""Memory of masks: persistent, and transient while the weights that they choose are perturbed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from ssam_scale.masks import Dense, Mask, ScoreBased, Scored
from ssam_scale.perturbation import SparseSAM

from .mask_selection import tensor_sizes
from .peak_memory import extra_bytes, mask_bytes
from .processes import on_ranks

_MASKS: dict[str, Callable[[], Mask]] = {
    "dense": Dense,
    "element 50%": lambda: Scored("element", 0.5, score="random"),
    "element 90%": lambda: Scored("element", 0.9, score="random"),
    "row 50%": lambda: Scored("row", 0.5, score="random"),
    "tensor 50%": lambda: Scored("tensor", 0.5, score="random"),
}


def _weights(total: int, device: torch.device) -> nn.ParameterList:
    """Parameters like a ViT-B's, without a network around them: nothing else takes memory then."""
    sizes, row = tensor_sizes(total)
    generator = torch.Generator().manual_seed(0)
    parameters = []
    for size in sizes:
        if size:
            shape = (size // row, row) if size % row == 0 else (size,)
            parameters.append(nn.Parameter(torch.randn(shape, generator=generator).to(device)))
    return nn.ParameterList(parameters)


def _measure(rank: int, size: int, device: torch.device, total: int) -> list[dict[str, Any]]:
    small = _weights(1000, device)
    for make in _MASKS.values():  # compiled, if need be
        opt = _ready(small, make())
        _perturb(opt)
    parameters = _weights(total, device)
    rows = []
    for what, make in _MASKS.items():
        opt = _ready(parameters, make())
        before = [p.detach().clone() for p in parameters]
        extra = extra_bytes(partial(_perturb, opt), device)
        exact = all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))
        del before
        density = opt.plan.perturbed / total
        rows.append(
            {
                "what": what,
                "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
                "weights": total,
                "density": density,
                "exact": exact,
                "persistent_bytes_per_weight": mask_bytes(opt) / total,
                "transient_bytes_per_weight": None if extra is None else extra / total,
                "transient_over_perturbed": None if extra is None else extra / (density * 4 * total),
            }
        )
    return rows


def _ready(parameters: nn.ParameterList, mask: Mask) -> SparseSAM:
    """With a mask chosen and an ascent gradient."""
    opt = SparseSAM(parameters, torch.optim.SGD(parameters, lr=0.1), mask=mask)
    if isinstance(mask, ScoreBased):
        opt.refresh()
    for p in parameters:
        p.grad = torch.ones_like(p)
    return opt


def _perturb(opt: SparseSAM) -> None:
    with opt.perturbed():
        pass


def bench_storage(weights: int) -> list[dict[str, Any]]:
    """Rows of the memory that masks over float32 weights of a ViT-B's shapes take, one a mask.

    `persistent_bytes_per_weight`: of the mask. `transient_bytes_per_weight`: the peak while weights are perturbed and
    restored, beyond the weights and their ascent gradient (measured by `peak_memory.extra_bytes`); divided by the bytes
    of the perturbed weights, `transient_over_perturbed`, of which at least 1 is needed to restore them.
    `exact`: they came back bit for bit.
    """
    rows: list[dict[str, Any]] = on_ranks(1, _measure, weights)
    return rows

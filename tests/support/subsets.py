"""Tensors of any shapes, strides and dtypes, and subsets of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from ssam_scale.masks import BitMask, Rows, Subset, pack

DTYPES = [torch.float32, torch.bfloat16, torch.float64]


@dataclass
class Given:
    """A tensor, a subset of it, the same as booleans of its shape, and a gradient of its shape and any strides."""

    tensor: Tensor
    subset: Subset | None
    booleans: Tensor
    gradient: Tensor


def in_order(t: Tensor, order: str) -> Tensor:
    """The same numbers in memory of another order."""
    if order == "channels_last" and t.ndim == 4:
        return t.to(memory_format=torch.channels_last)
    if order == "transposed" and t.ndim == 2:
        return t.T.contiguous().T
    return t


@st.composite
def tensors(draw: st.DrawFn, *, wholes: bool = False) -> list[Given]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    result = []
    for _ in range(draw(st.integers(1, 5))):
        shape = draw(st.lists(st.integers(0, 5), max_size=4))
        orders = st.sampled_from(["row-major", "channels_last", "transposed"])
        t = in_order(torch.randn(shape, generator=generator).to(draw(st.sampled_from(DTYPES))), draw(orders))
        gradient = torch.randn(shape, generator=generator).to(draw(st.sampled_from(DTYPES)))
        kind = draw(st.sampled_from(["bits", "rows", *(["whole"] if wholes else [])]))
        density = draw(st.sampled_from([0.0, 0.3, 1.0]))
        subset: Subset | None = None
        booleans = torch.ones(shape, dtype=torch.bool)
        if kind == "bits":
            booleans = torch.rand(shape, generator=generator) < density
            subset = BitMask(pack(booleans), t.numel())
        elif kind == "rows" and t.numel() and t.ndim:
            keep = torch.rand(shape[0], generator=generator) < density
            booleans = keep.view(-1, *[1] * (t.ndim - 1)).expand(shape)
            subset = Rows(keep, t.numel() // shape[0], 0, t.numel(), t.device)
        elif kind == "rows":
            subset = BitMask(pack(booleans), t.numel())
        result.append(Given(t, subset, booleans, in_order(gradient, draw(orders))))
    return result

"""Which weights a backend casts before it gathers them: those that autocast would cast behind the gather.

Under `torch.autocast` a linear layer or a convolution casts its weight by itself. Where weights are sharded that is
late: float32 was sent, and a second, cast copy of each is kept for the backward, while the gathered one is freed. A
backend that casts first sends half the bytes and keeps no copy, and what is computed is the same, bit for bit: autocast
stays on around it, and finds these weights cast.

All other parameters are gathered in float32, as autocast leaves them: of a normalization, a position embedding or a
scale of layers the arithmetic stays float32. A normalization's weight near 1 would have no room in bf16 for a
perturbation: the next number is 2^-7 away. Biases are few, and DeepSpeed's linear layers add them in float32.

Shards, gradients, their reduction and the optimizer are float32, and so is what ε is added to.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ssam_scale.torch_compat import HAS_GRAD_DTYPE

# Their forward uses the weight in one operator, which autocast casts for.
_LAYERS: tuple[Any, ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def cast_parameters(module: nn.Module, precision: torch.dtype) -> list[nn.Parameter]:
    """The float32 parameters that a forward under autocast to `precision` would use in `precision` alone.

    Not those of a subclass with a forward of its own, which may do something else with them first, nor those that
    another module uses, too. None of fp16, which is autocast's everywhere.

    Args:
        module: the model, sharded or not.
        precision: of autocast; float32: there is none.
    """
    if precision != torch.bfloat16 or not HAS_GRAD_DTYPE:
        return []
    cast: dict[int, nn.Parameter] = {}
    kept: set[int] = set()
    for each in module.modules():
        known = any(_computes_as(each, layer) for layer in _LAYERS)
        for name, p in each.named_parameters(recurse=False, remove_duplicate=False):
            if known and name == "weight" and p.dtype == torch.float32:
                cast[id(p)] = p
            else:
                kept.add(id(p))
    return [p for key, p in cast.items() if key not in kept]


def _computes_as(module: nn.Module, layer: Any) -> bool:
    """Whether a module's forward is that of `layer`."""
    own = type(module)
    return own.forward is layer.forward and getattr(own, "_conv_forward", None) is getattr(layer, "_conv_forward", None)

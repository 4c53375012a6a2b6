"""What there is to perturb, and the samples that scores are made of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ssam_scale.masks import Layout

from .stages import StagedModel


def weight_pool(module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, nn.Parameter], Layout]:
    """The parameters that can be perturbed, by their name in the network, and where the network uses them."""
    network = module.model if isinstance(module, StagedModel) else module
    mine = {id(p) for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
    parameters = {name: p for name, p in network.named_parameters() if id(p) in mine}
    if len(parameters) < len(mine):
        raise ValueError(f"{len(mine) - len(parameters)} of the optimizer's parameters are not the model's")
    if isinstance(module, StagedModel):
        first_use, depth = module.stage_of_parameters(), len(module.stages)
    else:
        first_use, depth = dict.fromkeys(parameters, 0), 1
    layout = Layout({n: p.numel() for n, p in parameters.items()}, {n: first_use[n] for n in parameters}, depth)
    return parameters, layout


def samples_of(batch: Any) -> Iterator[Any]:
    """The samples of a batch, each as a batch of one."""
    leaves: list[Tensor] = []
    tree_map(lambda leaf: leaves.append(leaf), batch)
    for index in range(len(leaves[0])):
        yield tree_map(lambda leaf, i=index: leaf[i : i + 1], batch)

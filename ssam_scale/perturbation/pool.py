"""The weights that can be perturbed: what they are called, where the network uses them, whose group they are in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ssam_scale.masks import Layout
from ssam_scale.sharding import Sharding

from .stages import StagedModel


@dataclass(frozen=True)
class WeightPool:
    """All weights that an optimizer trains.

    Attributes:
        parameters: by their name in the network, in the network's order.
        layout: their sizes and stages.
        group_of: index of the parameter group of each, by name.
    """

    parameters: dict[str, nn.Parameter]
    layout: Layout
    group_of: dict[str, int]

    def eligible(self, groups: Sequence[Mapping[str, Any]]) -> Layout:
        """The weights that a mask may choose from: those of the groups that are not left alone."""
        return self.layout.only({name for name, index in self.group_of.items() if groups[index]["rho"] > 0.0})


def weight_pool(sharding: Sharding, groups: Sequence[Sequence[nn.Parameter]]) -> WeightPool:
    """The pool of the parameters in `groups`, as `Sharding.trained` returned them.

    Raises:
        ValueError: a parameter is not the model's.
    """
    module = sharding.network
    network = module.model if isinstance(module, StagedModel) else module
    group_of = {id(p): index for index, group in enumerate(groups) for p in group}
    parameters = {name: p for name, p in network.named_parameters() if id(p) in group_of}
    if len(parameters) < len(group_of):
        raise ValueError(f"{len(group_of) - len(parameters)} of the optimizer's parameters are not the model's")
    if isinstance(module, StagedModel):
        first_use, depth = module.stage_of_parameters(), len(module.stages)
    else:
        first_use, depth = dict.fromkeys(parameters, 0), 1
    numels = [shard.numel for shard in sharding.shards(list(parameters.values()))]
    layout = Layout(dict(zip(parameters, numels, strict=True)), {name: first_use[name] for name in parameters}, depth)
    return WeightPool(parameters, layout, {name: group_of[id(p)] for name, p in parameters.items()})

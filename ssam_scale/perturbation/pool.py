"""What there is to perturb, and the samples that scores are made of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ssam_scale.masks import Layout
from ssam_scale.sharding import Sharding

from .stages import StagedModel


def weight_pool(sharding: Sharding, trained: Iterable[nn.Parameter]) -> tuple[dict[str, nn.Parameter], Layout]:
    """The parameters that can be perturbed, by their name in the network, and where the network uses them."""
    module = sharding.network
    network = module.model if isinstance(module, StagedModel) else module
    mine = {id(p) for p in trained}
    parameters = {name: p for name, p in network.named_parameters() if id(p) in mine}
    if len(parameters) < len(mine):
        raise ValueError(f"{len(mine) - len(parameters)} of the optimizer's parameters are not the model's")
    if isinstance(module, StagedModel):
        first_use, depth = module.stage_of_parameters(), len(module.stages)
    else:
        first_use, depth = dict.fromkeys(parameters, 0), 1
    numels = [shard.numel for shard in sharding.shards(list(parameters.values()))]
    layout = Layout(dict(zip(parameters, numels, strict=True)), {name: first_use[name] for name in parameters}, depth)
    return parameters, layout


def samples_of(batch: Any) -> Iterator[Any]:
    """The samples of a batch, each as a batch of one."""
    leaves: list[Tensor] = []
    tree_map(lambda leaf: leaves.append(leaf), batch)
    for index in range(len(leaves[0])):
        yield tree_map(lambda leaf, i=index: leaf[i : i + 1], batch)

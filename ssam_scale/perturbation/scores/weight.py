"""The magnitude of weights."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ssam_scale.sharding import ShardedWeights

from .registry import ScoreRequest, register_score


def weight_scores(sharding: ShardedWeights, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """|w|: float32, shaped like the local shards."""
    return [shard.weight.detach().abs().float() for shard in sharding.shards(parameters)]


@register_score("weight", "magnitude of the weight", "arXiv 2210.05177")
def weight(request: ScoreRequest) -> list[Tensor]:
    """The score of the same name."""
    return weight_scores(request.sharding, list(request.parameters.values()))

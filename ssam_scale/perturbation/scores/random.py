"""Random numbers, the same on any number of processes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ssam_scale.perturbation.rng import hashed, uniform_
from ssam_scale.sharding import ShardedWeights

from .registry import ScoreRequest, register_score


def random_scores(sharding: ShardedWeights, parameters: Sequence[nn.Parameter], seed: int) -> list[Tensor]:
    """Uniform random numbers in [0, 1): float32, shaped like the local shards.

    Each is a function of the seed, the parameter's index in `parameters` and the place in the whole parameter: element
    number i is output number i of SplitMix64 (doi 10.1145/2660193.2660195), of which the 24 highest bits are kept. So
    they are the same however the weights are sharded and on any device.

    Args:
        sharding: where the weights live.
        parameters: what to score.
        seed: of the numbers.
    """
    scores = []
    for index, shard in enumerate(sharding.shards(parameters)):
        score = torch.empty_like(shard.weight, dtype=torch.float32, memory_format=torch.contiguous_format)
        uniform_(score.view(-1), shard.start, hashed(seed, index))
        scores.append(score)
    return scores


@register_score("random", "uniform random numbers, by the mask's seed and the step", "arXiv 2210.05177")
def random(request: ScoreRequest) -> list[Tensor]:
    """The score of the same name."""
    return random_scores(request.sharding, list(request.parameters.values()), request.seed)

"""The scores that masks are chosen by, by name: each registers itself in its own file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor, nn

from ssam_scale.config.mask_sections import SampleScore, Score
from ssam_scale.masks import Scores
from ssam_scale.perturbation.loss import LossFn
from ssam_scale.registry import Registry
from ssam_scale.sharding import Sharding


@dataclass
class ScoreRequest:
    """What a refresh of a mask knows and wants.

    Attributes:
        wanted: names of the scores.
        sharding: where the weights live.
        optimizer: whose gradients are cleared around the passes.
        parameters: what to score, by name and in the model's order.
        seed: of random numbers.
        accumulated: the score of that name, by parameter; empty where nothing was accumulated.
        loss_fn: mean loss of a batch of one sample, for scores of samples.
        batches: this process's samples.
        samples: how many samples of all processes to use; None: all.
        scale: factor on the loss of float16 passes.
        of_samples: filled in by the first score of samples, for the other one.
    """

    wanted: Sequence[Score]
    sharding: Sharding
    optimizer: torch.optim.Optimizer
    parameters: Mapping[str, nn.Parameter]
    seed: int
    accumulated: Mapping[str, Tensor]
    loss_fn: LossFn | None = None
    batches: Iterable[Any] = ()
    samples: int | None = None
    scale: float = 1.0
    of_samples: dict[SampleScore, list[Tensor]] | None = field(default=None, init=False)

    @property
    def wanted_of_samples(self) -> list[SampleScore]:
        """The wanted scores that are computed from samples."""
        return [score for score in get_args(SampleScore) if score in self.wanted]


Compute = Callable[[ScoreRequest], list[Tensor]]

SCORES: Registry[Compute] = Registry("ssam_scale.perturbation.scores")
"""By name: functions that compute a score of each parameter, float32 and shaped like its local shard. Collective.

The scores are the same bit for bit however the weights are sharded.
"""

register_score = SCORES.register
"""A decorator of the function that computes a score; its name stands in `config.mask_sections.Score`, too."""


def compute_scores(request: ScoreRequest) -> dict[Score, Scores]:
    """All wanted scores, by name and parameter. Collective.

    Raises:
        ValueError: scores of samples are wanted without a loss function, or of fewer samples than asked for.
    """
    # Those of samples first, whose passes need the memory that the others would take.
    order = sorted(request.wanted, key=lambda name: name not in get_args(SampleScore))
    return {name: dict(zip(request.parameters, SCORES[name].value(request), strict=True)) for name in order}

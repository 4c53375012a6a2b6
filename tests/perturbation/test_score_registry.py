"""Scores by the name that a configuration gives them."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch

from ssam_scale.config.mask_sections import SampleScore, Score
from ssam_scale.perturbation.scores import SCORES, ScoreRequest, compute_scores, per_sample_scores, weight_scores
from ssam_scale.sharding.place import sharding_of
from tests.support.networks import batches, loss_fn, small_network


def request(*wanted: Any, with_samples: bool = True) -> ScoreRequest:
    model = small_network("vit")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    accumulated = {name: torch.full(p.shape, 2.0) for name, p in named.items()}
    more: dict[str, Any] = {"loss_fn": loss_fn, "batches": batches(1, 4)} if with_samples else {}
    return ScoreRequest(wanted, sharding_of(model), optimizer, named, 3, accumulated, **more)


def test_every_name_has_a_score_and_every_score_a_name() -> None:
    assert sorted(SCORES) == sorted(get_args(Score))
    assert set(get_args(SampleScore)) <= set(SCORES)
    assert all(entry.summary for entry in SCORES.values())


def test_all_at_once_are_each_by_itself() -> None:
    everything = request(*get_args(Score))
    scores = compute_scores(everything)
    assert set(scores) == set(get_args(Score))
    parameters = list(everything.parameters.values())
    both = per_sample_scores(
        everything.sharding,
        everything.optimizer,
        parameters,
        loss_fn,
        batches(1, 4),
        kinds=get_args(SampleScore),
        seed=3,
    )
    expected = {**both, "weight": weight_scores(everything.sharding, parameters)}
    for name, tensors in expected.items():
        assert all(map(torch.equal, scores[name].values(), tensors)), name
    assert all(bool((s == 2.0).all()) for s in scores["accumulated"].values())
    assert all(0.0 <= float(s.min()) <= float(s.max()) < 1.0 for s in scores["random"].values())
    assert list(scores["random"]) == list(everything.parameters)


def test_scores_of_samples_need_samples() -> None:
    with pytest.raises(ValueError, match="gradient scores need a loss function and batches of samples"):
        compute_scores(request("weight", "gradient", with_samples=False))

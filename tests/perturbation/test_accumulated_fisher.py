"""The running mean of squared gradients, on any backend."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ssam_scale.perturbation.scores import AccumulatedFisher
from ssam_scale.sharding import World
from ssam_scale.sharding.chunks import gathered
from ssam_scale.sharding.place import place, sharding_of
from tests.support.networks import batches, freeze_batchnorm, loss_fn, part, small_network
from tests.support.ranks import alone, run_ranks

DECAY = 0.9


def accumulate(world: World, backends: list[str]) -> list[Any]:
    """Whole scores after three batches of gradients at fixed weights, one of which is left out."""
    results = []
    for backend in backends:
        model = freeze_batchnorm(small_network("resnet"))
        placed, base = place(
            model,
            [stage.block for stage in model.stages],
            backend,  # type: ignore[arg-type]
            world,
            lambda model=model: torch.optim.SGD(model.parameters(), lr=0.1),
        )
        sharding, parameters = sharding_of(placed), list(model.parameters())
        base, _ = sharding.unwrap_optimizer(base, None)
        fisher = AccumulatedFisher(sharding, parameters, decay=DECAY)
        for step, batch in enumerate(batches(3, 12)):
            sharding.clear_gradients(base)
            with sharding.micro_batch(last=True):
                sharding.backward(loss_fn(sharding.descent_module, part(batch, world.rank, world.size)) * 8.0)
            gradients = [g.clone() for g in sharding.gradients(parameters)]
            if step == 1:  # on one process alone, where weights are spread
                spread = sharding.shard_group.size > 1
                last = max(i for i, g in enumerate(gradients) if g.numel())
                if not spread or world.rank == world.size - 1:
                    gradients[last].view(-1)[0] = math.nan
            fisher.update(gradients, torch.tensor(0.125) if step else 0.125)
        state = gathered(fisher.state_dict())
        other = AccumulatedFisher(sharding, parameters)
        other.load_state_dict(state)
        again = all(torch.equal(a, b) for a, b in zip(fisher.scores, other.scores, strict=True))
        results.append({"whole": state["scores"], "again": again})
    return results


def expected() -> list[Tensor]:
    model = freeze_batchnorm(small_network("resnet"))
    named = list(model.parameters())
    scores = [torch.zeros_like(p) for p in named]
    for step, batch in enumerate(batches(3, 12)):
        gradients = torch.autograd.grad(loss_fn(model, batch), named)
        if step != 1:
            scores = [DECAY * s + (1 - DECAY) * g**2 for s, g in zip(scores, gradients, strict=True)]
    return scores


def check(results: list[Any]) -> None:
    for result in results:
        assert result["again"]
        for mine, theirs in zip(result["whole"], expected(), strict=True):
            assert mine.shape == theirs.shape
            assert torch.allclose(mine, theirs, rtol=1e-3, atol=1e-6 * float(theirs.max()) + 1e-12)


def test_one_process() -> None:
    check(alone(accumulate, ["single"]))


@pytest.mark.slow
def test_ddp_and_fsdp2() -> None:
    for results in run_ranks(2, accumulate, ["ddp", "fsdp2"]):
        check(results)


@pytest.mark.slow
def test_zero() -> None:
    for results in run_ranks(3, accumulate, [f"zero{stage}" for stage in range(4)]):
        check(results)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e25])
def test_a_step_that_is_not_finite_is_left_out(bad: float) -> None:
    model = nn.Linear(3, 2)
    fisher = AccumulatedFisher(sharding_of(model), list(model.parameters()), decay=0.5)
    fisher.update([torch.full((2, 3), 2.0, dtype=torch.bfloat16), torch.full((2,), 4.0)], 0.5)
    gradients = [torch.ones(2, 3), torch.tensor([bad, 1.0])]
    fisher.update(gradients)
    assert fisher.scores[0].tolist() == [[0.5] * 3] * 2
    assert fisher.scores[1].tolist() == [2.0, 2.0]
    assert gradients[0].tolist() == [[1.0] * 3] * 2


def test_misuse() -> None:
    model = nn.Linear(3, 2)
    sharding = sharding_of(model)
    with pytest.raises(ValueError, match="decay is 1"):
        AccumulatedFisher(sharding, [model.weight], decay=1.0)
    fisher = AccumulatedFisher(sharding, [model.weight])
    with pytest.raises(ValueError, match=r"shape \(2,\) at 0, these have \(2, 3\)"):
        fisher.load_state_dict({"scores": [model.bias]})
    with pytest.raises(ValueError, match="2 tensors, these have 1"):
        fisher.load_state_dict({"scores": [model.weight, model.bias]})
    AccumulatedFisher(sharding, []).update([])

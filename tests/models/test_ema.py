"""Averaged weights are what a forward uses while they are swapped in, wherever the weights live."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ssam_scale.models.ema import EMA
from ssam_scale.perturbation import SparseSAM
from ssam_scale.sharding import World
from ssam_scale.sharding.place import place, sharding_of
from tests.support.networks import batches, freeze_batchnorm, loss_fn, part, small_network
from tests.support.ranks import alone, run_ranks


def _outputs(world: World, backends: list[Any]) -> list[list[torch.Tensor]]:
    """After three steps: what the network computes with its weights, with the averaged ones, and with its own again."""
    results = []
    for backend in backends:
        model = small_network("vit")
        freeze_batchnorm(model)
        module, base = place(
            model,
            [stage.block for stage in model.stages],
            backend,
            world,
            lambda model=model: torch.optim.SGD(model.parameters(), lr=0.1),
            batch_size=8 // world.size,
        )
        opt = SparseSAM(module, base, rho=0.05)
        average = EMA(model.model, 0.5, opt.sharding)
        for batch in batches(3, 8):
            opt.step(loss_fn, part(batch, world.rank, world.size))
            average.update()
        images = batches(1, 4, seed=5)[0][0]
        with torch.no_grad():
            own = module(images)
            with average.swapped_in():
                averaged = module(images)
            results.append([own.clone(), averaged.clone(), module(images).clone()])
    return results


@pytest.mark.slow
def test_the_averaged_weights_are_the_same_on_every_backend() -> None:
    [(own, averaged, again)] = alone(_outputs, ["single"])
    assert torch.equal(own, again)
    assert float((own - averaged).abs().max()) > 1e-3
    # ZeRO's stage 3 keeps small parameters gathered between forwards: they must be gathered anew, both ways.
    for there, there_averaged, there_again in run_ranks(2, _outputs, ["ddp", "fsdp2", "zero2", "zero3"])[0]:
        torch.testing.assert_close(there, own, atol=2e-6, rtol=0)  # float32 steps, apart by their rounding
        torch.testing.assert_close(there_averaged, averaged, atol=2e-6, rtol=0)
        assert torch.equal(there, there_again)


def test_the_decay_warms_up_as_timms() -> None:
    from timm.utils.model_ema import ModelEmaV3

    model = small_network("vit")
    theirs = ModelEmaV3(nn.Linear(1, 1), decay=0.99, use_warmup=True)
    module, _ = place(model, [], "single", World(), lambda: torch.optim.SGD(model.parameters()))
    mine = EMA(model.model, 0.99, sharding_of(module), warmup=True)
    for step in (1, 2, 3, 10, 100, 999, 1000, 1001, 10**6):
        assert mine.get_decay(step) == pytest.approx(theirs.get_decay(step), rel=1e-12)
    assert mine.get_decay() == theirs.get_decay() == 0.99
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    mine.update(1)  # forgets the weights that were there at first
    for name, averaged in mine.state_dict().items():
        assert torch.equal(averaged, model.model.get_parameter(name))

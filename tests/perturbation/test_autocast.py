"""One `torch.autocast` around a whole training loop computes what one inside of each forward does.

Autocast remembers the low-precision copies of weights until its outermost context ends. Around a loop, that is longer
than the weights stay what they were.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssam_scale import Depth, Interval, SparseSAM
from ssam_scale.models.ema import EMA
from ssam_scale.train.checkpoint import ModelState
from tests.support.networks import batches, small_network

Loop = Callable[[SparseSAM, nn.Module, Any], Any]


def low() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


def in_bf16(forward: Any, batch: Any) -> Tensor:
    with low():  # within another one it changes nothing
        logits = forward(batch[0])
    return F.cross_entropy(logits.float(), batch[1])


def by_batches(opt: SparseSAM, model: nn.Module, batch: Any) -> Any:
    return opt.step(in_bf16, batch)


def by_closure(opt: SparseSAM, model: nn.Module, batch: Any) -> Any:
    def closure() -> Tensor:
        loss = in_bf16(model, batch)
        loss.backward()
        return loss

    return opt.step(closure)


def by_hand(opt: SparseSAM, model: nn.Module, batch: Any) -> Any:
    loss = in_bf16(model, batch)
    loss.backward()
    with opt.perturbed():
        in_bf16(model, batch).backward()
    opt.step()
    opt.zero_grad()
    return loss


def base_step(opt: SparseSAM, model: nn.Module, batch: Any) -> Any:
    loss = in_bf16(model, batch)
    loss.backward()
    opt.step()
    opt.zero_grad()
    return loss


def trained(loop: Loop, around: Callable[[], Any], **arguments: Any) -> list[Tensor]:
    """The losses of four steps, what the network computes then, and the weights it has."""
    model = small_network("vit").train()
    opt = SparseSAM(model, torch.optim.SGD(model.parameters(), lr=0.5), **{"rho": 0.1, **arguments})
    seen = []
    with around():
        for batch in batches(4, 8):
            seen.append(loop(opt, model, batch).detach())
        with low():
            seen.append(model(batches(1, 4, seed=5)[0][0]).detach())
    return [*seen, *(p.detach().clone() for p in model.parameters())]


WITHOUT_AN_ASCENT: dict[str, tuple[Loop, dict[str, Any]]] = {
    "radius 0": (by_batches, {"rho": 0.0}),
    "an interval": (by_batches, {"schedule": Interval(3)}),
    "an interval and a cut": (by_batches, {"schedule": Interval(3), "mask": Depth((0.5, 0.5))}),
    "reuse": (by_batches, {"schedule": Interval(2, reuse=0.5)}),
    "every step": (by_batches, {}),
    "a closure, radius 0": (by_closure, {"rho": 0.0}),
    "a closure, every step": (by_closure, {}),
    "by hand, radius 0": (by_hand, {"rho": 0.0}),
    "by hand, every step": (by_hand, {}),
    "the base optimizer's steps": (base_step, {}),
}


@pytest.mark.parametrize(("loop", "arguments"), WITHOUT_AN_ASCENT.values(), ids=WITHOUT_AN_ASCENT)
def test_around_the_loop_or_inside_of_it(loop: Loop, arguments: dict[str, Any]) -> None:
    outer, inner = trained(loop, low, **arguments), trained(loop, nullcontext, **arguments)
    assert all(torch.equal(a, b) for a, b in zip(outer, inner, strict=True))
    assert not torch.equal(outer[0], outer[1])


def test_an_evaluation_between_steps_leaves_them_their_gradients() -> None:
    """Without gradients, autocast remembers copies that none can flow through."""

    def loop(opt: SparseSAM, model: nn.Module, batch: Any) -> Any:
        with torch.no_grad(), low():
            model(batch[0])
        return opt.step(in_bf16, batch)

    for rho in (0.0, 0.1):
        outer, inner = trained(loop, low, rho=rho), trained(loop, nullcontext, rho=rho)
        assert all(torch.equal(a, b) for a, b in zip(outer, inner, strict=True))


def test_weights_that_are_loaded_or_swapped_in_are_what_a_forward_sees() -> None:
    model = small_network("vit").train()
    opt = SparseSAM(model, torch.optim.SGD(model.parameters(), lr=0.5), rho=0.0)
    state, average, images = ModelState(model, opt.sharding), EMA(model, 0.5, opt.sharding), batches(1, 4, seed=5)[0][0]
    saved = {name: t.clone() for name, t in state.state_dict().items()}

    def computed() -> Tensor:
        with low():
            return model(images).detach().clone()

    first = computed()
    for batch in batches(3, 8):
        opt.step(in_bf16, batch)
        average.update()
    with average.swapped_in():
        averaged = computed()
    last = computed()
    assert not torch.equal(first, last)
    assert not torch.equal(averaged, last)
    with low():
        assert torch.equal(computed(), last)
        with average.swapped_in():
            assert torch.equal(computed(), averaged)
        assert torch.equal(computed(), last)
        state.load_state_dict(saved)
        assert torch.equal(computed(), first)


def test_loading_weights_and_then_the_optimizer() -> None:
    """Whoever loads the weights by `nn.Module.load_state_dict` loads the optimizer too."""
    model = small_network("vit").train()
    opt = SparseSAM(model, torch.optim.SGD(model.parameters(), lr=0.5), rho=0.0)
    saved = {name: t.clone() for name, t in model.state_dict().items()}, opt.state_dict()
    images = batches(1, 4, seed=5)[0][0]
    with low():
        first = model(images).detach().clone()
        opt.step(in_bf16, batches(1, 8)[0])
        assert not torch.equal(model(images), first)
        model.load_state_dict(saved[0])
        opt.load_state_dict(saved[1])
        assert torch.equal(model(images), first)

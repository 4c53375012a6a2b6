"""`with opt.perturbed()` in loops of every style: gradients cleared anywhere, steps skipped, mistakes."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from ssam_scale import SparseSAM
from tests.support.networks import batches, loss_fn

BATCHES = batches(4, 4)
BATCH = BATCHES[0]


def network(layer: Callable[[], nn.Module] = lambda: nn.Dropout(0.5)) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 8), layer(), nn.Tanh(), nn.Linear(8, 10))


def sam(model: nn.Module) -> SparseSAM:
    return SparseSAM(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), rho=0.1)


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


CLEARED: dict[str, tuple[str, Callable[[SparseSAM, nn.Module], None]]] = {
    "before the first forward": ("top", lambda opt, model: opt.zero_grad()),
    "after the first forward": ("forward", lambda opt, model: opt.zero_grad()),
    "after the first forward, of the model": ("forward", lambda opt, model: model.zero_grad()),
    "after the step": ("end", lambda opt, model: opt.zero_grad()),
    "after the step, of the model": ("end", lambda opt, model: model.zero_grad()),
    "after the step, to zeros": ("end", lambda opt, model: model.zero_grad(set_to_none=False)),
}


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("where", CLEARED)
def test_gradients_may_be_cleared_anywhere_in_the_loop(where: str, parts: int) -> None:
    place, clear = CLEARED[where]
    model, plain = network(), network()
    opt, exact = sam(model), sam(plain)
    steps = [BATCHES[i : i + parts] for i in range(0, 4, parts)]
    torch.manual_seed(1)
    for micro in steps:
        torch.rand(3)
        exact.step(loss_fn, *micro)
    torch.manual_seed(1)
    for micro in steps:
        torch.rand(3)
        if place == "top":
            clear(opt, model)
        for index, batch in enumerate(micro):
            loss = loss_fn(model, batch) / parts
            if place == "forward" and index == 0:
                clear(opt, model)
            loss.backward()
        with opt.perturbed():
            for batch in micro:
                (loss_fn(model, batch) / parts).backward()
        opt.step()
        if place == "end":
            clear(opt, model)
    assert same(model, plain)


def test_a_step_that_the_scaler_skips_leaves_nothing_behind() -> None:
    model, plain = network(), network()
    opt, exact, scaler = sam(model), sam(plain), torch.amp.GradScaler("cpu", 1024.0)
    torch.manual_seed(1)
    for index, batch in enumerate(BATCHES):
        if index == 1:
            loss_fn(plain, batch)
        else:
            exact.step(loss_fn, batch)
    torch.manual_seed(1)
    for index, batch in enumerate(BATCHES):
        model.zero_grad()  # which tells the optimizer nothing
        scaler.scale(loss_fn(model, batch)).backward()
        with opt.perturbed():
            scaler.scale(loss_fn(model, batch) * (float("inf") if index == 1 else 1.0)).backward()
        scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
    assert same(model, plain)


def both(opt: SparseSAM, model: nn.Module) -> None:
    loss_fn(model, BATCH).backward()
    with opt.perturbed():
        loss_fn(model, BATCH).backward()


def no_first_pass(opt: SparseSAM, model: nn.Module) -> None:
    with opt.perturbed():
        loss_fn(model, BATCH).backward()


def cleared_before(opt: SparseSAM, model: nn.Module) -> None:
    loss_fn(model, BATCH).backward()
    opt.zero_grad()
    with opt.perturbed():
        loss_fn(model, BATCH).backward()


def cleared_after(opt: SparseSAM, model: nn.Module) -> None:
    both(opt, model)
    opt.zero_grad()
    opt.step()


def no_second_pass(opt: SparseSAM, model: nn.Module) -> None:
    loss_fn(model, BATCH).backward()
    with opt.perturbed():
        loss_fn(model, BATCH)
    opt.step()


def stepped_inside(opt: SparseSAM, model: nn.Module) -> None:
    loss_fn(model, BATCH).backward()
    with opt.perturbed():
        loss_fn(model, BATCH).backward()
        opt.step()


def stepped_with_a_batch_inside(opt: SparseSAM, model: nn.Module) -> None:
    loss_fn(model, BATCH).backward()
    with opt.perturbed():
        opt.step(loss_fn, BATCH)


def nested(opt: SparseSAM, model: nn.Module) -> None:
    loss_fn(model, BATCH).backward()
    with opt.perturbed(), opt.perturbed():
        loss_fn(model, BATCH).backward()


def for_each_micro_batch(opt: SparseSAM, model: nn.Module) -> None:
    both(opt, model)
    both(opt, model)


def first_pass_forgotten_once(opt: SparseSAM, model: nn.Module) -> None:
    both(opt, model)
    no_first_pass(opt, model)


MISTAKES = {
    no_first_pass: "there is no gradient to perturb along: call backward on the loss before",
    cleared_before: "there is no gradient to perturb along",
    cleared_after: "nothing to step by: .* or gradients were cleared after it",
    no_second_pass: "nothing to step by: no backward was called inside",
    stepped_inside: "step was called where the weights are perturbed.* call it after the block",
    stepped_with_a_batch_inside: "step was called where the weights are perturbed",
    nested: "was entered inside of another",
    for_each_micro_batch: "second pass of the step before.* all of their second ones in one `with",
    first_pass_forgotten_once: "second pass of the step before.* clear them after opt.step",
}


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_a_mistake_is_one_sentence_and_the_weights_stay(mistake: Callable[[SparseSAM, nn.Module], None]) -> None:
    model, plain = network(nn.Identity), network(nn.Identity)
    opt = sam(model)
    with pytest.raises(RuntimeError, match=MISTAKES[mistake]) as caught:
        mistake(opt, model)
    assert "\n" not in str(caught.value)
    assert same(model, plain)
    model.zero_grad()
    both(opt, model)  # and nothing is left of it
    opt.step()
    sam(plain).step(loss_fn, BATCH)
    assert same(model, plain)


def test_a_loop_that_never_clears_gradients_is_told_in_its_second_step() -> None:
    model = network(nn.Identity)
    opt = sam(model)
    both(opt, model)
    opt.step()
    with pytest.raises(RuntimeError, match=r"or were added to them: clear them after opt.step\(\)"):
        both(opt, model)


def test_a_block_that_sees_less_than_what_was_before_it_is_told_once() -> None:
    model = network()
    opt = sam(model)

    def accumulated(inside: int) -> None:
        for batch in BATCHES:
            (loss_fn(model, batch) / 4).backward()
        with torch.no_grad():
            loss_fn(model, BATCH)
        with opt.perturbed():
            for batch in BATCHES[:inside]:
                (loss_fn(model, batch) / 4).backward()
        opt.step()
        opt.zero_grad()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        accumulated(4)
    with pytest.warns(UserWarning, match=r"the model ran 4 times before `with .* and 1 inside of it") as caught:
        accumulated(1)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        accumulated(1)


class Averages(nn.Module):
    """Counts forwards, and keeps a running mean in a buffer that it replaces."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("constant", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.count += 1
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return x * self.constant


class Instances(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm1d(2, track_running_stats=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.view(-1, 2, 4)).flatten(1)


WRITERS: dict[str, Callable[[], nn.Module]] = {
    "averages": Averages,
    "instance norm": Instances,
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)),
    "old spectral norm": lambda: nn.utils.spectral_norm(nn.Linear(8, 8)),
    "batch norm of all batches": lambda: nn.BatchNorm1d(8, momentum=None),
}


def in_one_call(opt: SparseSAM, model: nn.Module) -> None:
    opt.step(loss_fn, BATCH)


def by_closure(opt: SparseSAM, model: nn.Module) -> None:
    def closure() -> Tensor:
        loss = loss_fn(model, BATCH)
        loss.backward()
        return loss

    opt.step(closure)


def by_hand(opt: SparseSAM, model: nn.Module) -> None:
    both(opt, model)
    opt.step()
    opt.zero_grad()


FORMS = [in_one_call, by_closure, by_hand]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
@pytest.mark.parametrize("layer", WRITERS)
def test_whatever_a_forward_writes_to_buffers_is_written_once(layer: str, form: Any) -> None:
    model, plain = network(WRITERS[layer]), network(WRITERS[layer])
    opt = sam(model)
    for _ in range(2):
        plain.load_state_dict(model.state_dict())
        form(opt, model)
        loss_fn(plain, BATCH)
        for (name, mine), theirs in zip(model.named_buffers(), plain.buffers(), strict=True):
            assert torch.equal(mine, theirs), name
    with opt.rehearsal() as rehearse:
        rehearse("dense", loss_fn, BATCH)
    for (name, mine), theirs in zip(model.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(mine, theirs), name


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_both_passes_draw_the_same_of_every_generator(form: Any) -> None:
    """As of mixup in a loss function, and of layers left out by Python's `random`."""
    drawn = []

    class Draws(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            drawn.append((random.random(), numpy.random.rand(), float(torch.rand(()))))
            return x

    model = network(Draws)
    opt = sam(model)
    for _ in range(2):
        form(opt, model)
    assert drawn[0] == drawn[1]
    assert drawn[2] == drawn[3]
    assert not set(drawn[0]) & set(drawn[2])

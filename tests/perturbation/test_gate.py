"""AE-SAM's gate: which steps perturb, what the others cost, and what is remembered."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ssam_scale import Depth, Fresh, Gate, Interval, Momentum, SparseSAM
from ssam_scale.perturbation.gate import GateState
from tests.support.networks import batches, loss_fn, small_network

ALWAYS, NEVER = Gate(10, first=-10.0, last=-10.0), Gate(10, first=10.0, last=10.0)


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def stepped(steps: int, form: str = "batches", **options: Any) -> tuple[list[torch.Tensor], list[str]]:
    model = small_network("vit")
    opt = SparseSAM(model, sgd(model), rho=0.1, **options)
    kinds = []
    for batch in batches(steps, 8):

        def closure(model: nn.Module = model, opt: SparseSAM = opt, batch: Any = batch) -> torch.Tensor:
            opt.zero_grad()
            loss = loss_fn(model, batch)
            loss.backward()
            return loss

        if form == "batches":
            opt.step(loss_fn, batch)
        else:
            opt.step(closure)
        assert opt.report is not None
        kinds.append(opt.report.kind)
    return [p.detach().clone() for p in model.parameters()], kinds


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_gate_that_is_always_open_is_sam_and_one_that_never_is_the_base_optimizer() -> None:
    opened, kinds = stepped(4, gate=ALWAYS)
    assert same(opened, stepped(4)[0])
    assert kinds == ["dense"] * 4
    closed, kinds = stepped(4, gate=NEVER)
    # The first gradient is as long as the mean of all so far.
    assert kinds == ["dense", "base", "base", "base"]
    model = small_network("vit")
    opt = SparseSAM(model, sgd(model), rho=0.1, schedule=lambda step, group: float(step == 0))
    for batch in batches(4, 8):
        opt.step(loss_fn, batch)
    assert same(closed, [p.detach() for p in model.parameters()])


def test_a_closure_is_called_once_where_it_stays_closed() -> None:
    gate = Gate(6, delta=0.5, first=0.5)
    weights, kinds = stepped(6, gate=gate)
    by_closure, kinds_by_closure = stepped(6, "closure", gate=gate)
    assert same(weights, by_closure)
    assert kinds == kinds_by_closure
    assert {"base", "dense"} == set(kinds)


def test_a_step_that_stays_closed_costs_one_pass() -> None:
    model = small_network("vit")
    opt = SparseSAM(model, sgd(model), rho=0.1, gate=NEVER, mask=Depth(0.5))
    counts = []
    for batch in batches(2, 8):
        with FlopCounterMode(display=False) as counter:
            opt.step(loss_fn, batch)
        counts.append(counter.get_total_flops())
    assert counts[0] == 2 * counts[1]


def test_a_resumed_run_is_the_uninterrupted_one() -> None:
    data = batches(6, 8)
    gate = Gate(6, delta=0.5, first=0.5)
    model = small_network("vit")
    opt = SparseSAM(model, sgd(model), rho=0.1, gate=gate)
    for batch in data[:3]:
        opt.step(loss_fn, batch)
    saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
    for batch in data[3:]:
        opt.step(loss_fn, batch)
    again = small_network("vit")
    resumed = SparseSAM(again, sgd(again), rho=0.1, gate=gate)
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    for batch in data[3:]:
        resumed.step(loss_fn, batch)
    assert same([p.detach() for p in again.parameters()], [p.detach() for p in model.parameters()])


def test_a_rehearsal_counts_for_nothing() -> None:
    runs = []
    for rehearsed in (False, True):
        model = small_network("vit")
        opt = SparseSAM(model, sgd(model), rho=0.1, gate=Gate(4, delta=0.5, first=0.5))
        for batch in batches(4, 8):
            if rehearsed:
                with opt.rehearsal() as rehearse:
                    for what in ("base", "dense", "own"):
                        rehearse(what, loss_fn, batch)
            opt.step(loss_fn, batch)
        runs.append(([p.detach() for p in model.parameters()], opt.sparse.state_dict()["gate"]))
    assert same(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=30), st.floats(0.0, 0.99))
def test_mean_and_variance_are_those_of_the_paper(squared: list[float], delta: float) -> None:
    state = GateState(Gate(len(squared), delta, first=1.0, last=-1.0))
    mean, variance = squared[0], 0.0
    for step, each in enumerate(squared):
        mean = delta * mean + (1 - delta) * each if step else each
        variance = delta * variance + (1 - delta) * (each - mean) ** 2
        c = 1.0 - 2.0 * step / len(squared)
        assert state.opens(each, step) == (each >= mean + c * math.sqrt(variance)) == state.opened


def test_a_gradient_that_is_not_finite_stays_closed_and_is_forgotten() -> None:
    state = GateState(ALWAYS)
    assert state.opens(4.0, 0)
    before = state.state_dict()["gate"].tolist()
    assert not state.opens(math.inf, 1)
    assert not state.opens(math.nan, 2)
    assert state.state_dict()["gate"].tolist() == before
    assert state.opens(4.0, 3)


def test_the_expected_share_is_half_by_the_papers_settings() -> None:
    assert Gate(100).expected_share == pytest.approx(0.5)
    assert Gate(100, first=-10.0, last=-10.0).expected_share == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"gate": 0.9}, TypeError, r"gate is 0.9 \(float\); Gate\(steps\) is needed, or None"),
        ({"gate": ALWAYS, "direction": Momentum()}, ValueError, r"a gate looks at the plain gradient.*use Fresh\(\)"),
        ({"gate": ALWAYS, "direction": Fresh(0.5)}, ValueError, r"use Fresh\(\)"),
        ({"gate": ALWAYS, "schedule": Interval(2, reuse=0.5)}, ValueError, "a gate has no ascents in fixed steps"),
    ],
)
def test_what_a_gate_does_not_go_with(options: dict[str, Any], error: type[Exception], message: str) -> None:
    model = small_network("vit")
    with pytest.raises(error, match=message):
        SparseSAM(model, sgd(model), **options)


def test_by_hand_the_second_pass_cannot_be_left_out() -> None:
    model = small_network("vit")
    opt = SparseSAM(model, sgd(model), gate=ALWAYS)
    loss_fn(model, batches(1, 4)[0]).backward()
    with pytest.raises(RuntimeError, match="a gate decides after the first pass"), opt.perturbed():
        pass


@pytest.mark.parametrize("given_", [{"steps": 0}, {"steps": 5, "delta": 1.0}, {"steps": 5, "first": math.inf}])
def test_a_gate_out_of_its_range_is_refused(given_: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"(steps|delta|first) is "):
        Gate(**given_)


@pytest.mark.parametrize("form", ["batches", "closure"])
@pytest.mark.parametrize("gate", [ALWAYS, NEVER], ids=["open", "closed"])
def test_another_optimizers_weights_have_the_gradient_of_one_pass(gate: Gate, form: str) -> None:
    found = []
    for options in ({}, {"gate": gate}):
        torch.manual_seed(0)
        body, head = nn.Linear(4, 4), nn.Linear(4, 2)
        model = nn.Sequential(body, nn.Tanh(), head)
        opt = SparseSAM(model, torch.optim.SGD(body.parameters(), lr=0.0), rho=1e-12, **options)
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
        for number in range(2):
            for p in head.parameters():
                p.grad = torch.full_like(p, 100.0) if number else None

            def closure(model: Any = model, x: Any = x) -> torch.Tensor:
                loss = model(x).square().mean()
                loss.backward()
                return loss

            if form == "batches":
                opt.step(lambda forward, b: forward(b).square().mean(), x)
            else:
                opt.step(closure)
        found.append([p.grad.clone() for p in head.parameters() if p.grad is not None])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_a_gates_own_rehearsal_is_the_step_that_it_takes() -> None:
    model = small_network("vit")
    opt = SparseSAM(model, sgd(model), rho=0.1, gate=ALWAYS, mask=Depth(0.5))
    taken, rehearsed = opt.resolve(by_hand=True), opt._rehearsed("own", 1)
    assert (taken.gradients, taken.computed) == (rehearsed.gradients, rehearsed.computed)

"""What a resolved step says is what the passes do: computed gradients, kinds of steps, reports."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ssam_scale import Dense, Depth, Friendly, Interval, Momentum, Named, Norms, Savings, Scored, SparseSAM, Window
from ssam_scale.masks import Mask
from ssam_scale.perturbation import ConstantRadius, ResolvedStep, StagedModel, StepOptions, no_phases, step_shares
from tests.support.networks import batches, loss_fn, small_network, small_resnext, tied_network

RHO = 0.1


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


NETWORKS: dict[str, Callable[[], StagedModel]] = {
    "resnext": small_resnext,
    "tied": tied_network,
    "vit": lambda: small_network("vit"),
    "convnext": lambda: small_network("convnext"),
}
MASKS: dict[str, Callable[[], Mask]] = {
    "dense": Dense,
    "element": lambda: Scored("element", 0.5, score="weight"),
    "row 50%": lambda: Scored("row", 0.5, score="weight", allocation="uniform"),
    "row 95%": lambda: Scored("row", 0.05, score="weight", allocation="uniform"),
    "tensor": lambda: Scored("tensor", 0.5, score="random"),
    "block": lambda: Scored("block", 0.5, score="random"),
    "cut in the middle": lambda: Depth((0.5, 0.5)),
    "weights": lambda: Named("weight"),
}
SAVINGS = {
    "all savings": Savings(),
    "not elided": Savings(elide=False),
    "prefix not shared": Savings(share_prefix=False),
}


def optimizer_for(network: str, mask: str, savings: str = "all savings", **options: Any) -> SparseSAM:
    model = NETWORKS[network]()
    opt = SparseSAM(
        model, sgd(model), rho=RHO, mask=MASKS[mask](), savings=SAVINGS[savings], calibrate_every=None, **options
    )
    if opt.refresh_is_due:
        opt.refresh()
    return opt


def computed_by_an_ascent(opt: SparseSAM, resolved: ResolvedStep, micro_batches: int = 1) -> dict[str, int]:
    """Elements of each gradient that an ascent has computed: a row that it has left out is zero to the last element."""
    opt.zero_grad()
    with torch.enable_grad():
        opt.passes(resolved, loss_fn, batches(micro_batches, 8), None, no_phases).ascend()
    found = {}
    for name, p in opt.parameters.by_name.items():
        if p.grad is not None:
            # Of a vector no part is ever left out, and some of an attention's bias is zero by the rules of softmax.
            rows = p.grad.reshape(1 if p.ndim < 2 else p.shape[0], -1)
            found[name] = int((rows != 0).any(1).sum()) * rows.shape[1]
    opt.zero_grad()
    return found


@pytest.mark.parametrize("savings", SAVINGS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    "network", ["tied", *(pytest.param(n, marks=pytest.mark.slow) for n in NETWORKS if n != "tied")]
)
def test_an_ascent_computes_what_the_resolved_step_says(network: str, mask: str, savings: str) -> None:
    opt = optimizer_for(network, mask, savings)
    for micro_batches in (1, 2):
        resolved = opt.resolve(micro_batches)
        found = computed_by_an_ascent(opt, resolved, micro_batches)
        assert found.keys() == resolved.computed.keys()
        assert found.keys().isdisjoint(resolved.elided)
        wrong = {n: (found[n], resolved.computed[n]) for n in found if found[n] != resolved.computed[n]}
        assert not wrong


def test_rows_are_those_of_layers_that_can_and_of_masks_that_leave_enough_out() -> None:
    half = optimizer_for("resnext", "row 50%").resolve()
    grouped = {name for name in half.plan.weights if name.endswith("conv2.weight")}
    assert grouped
    assert half.rows.keys() >= {"layer1.0.conv1.weight", "layer1.0.conv3.weight", "fc.weight"}
    assert half.rows.keys().isdisjoint(grouped)
    nearly_all = optimizer_for("resnext", "row 95%").resolve()
    assert nearly_all.rows.keys() == {"fc.weight"}  # nine of ten; of the others at least fifteen of sixteen are kept


def test_a_tied_weight_keeps_the_gradient_that_the_shared_prefix_needs() -> None:
    opt = optimizer_for("tied", "cut in the middle")
    resolved = opt.resolve()
    assert (resolved.cut, resolved.shares_prefix) == (2, True)
    assert "blocks.0.weight" in resolved.computed
    assert "blocks.0.weight" not in resolved.elided


KINDS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "no radius": ({"rho": 0.0}, ["base", "base"]),
    "dense SAM": ({}, ["dense", "dense"]),
    "moving cut": ({"mask": Depth((0.5, 0.5))}, ["sparse", "sparse"]),
    "calibrated": (
        {"mask": Depth((0.5, 0.5)), "norm": "calibrated", "calibrate_every": 2},
        ["calibrating"] * 3 + ["sparse", "calibrating"] * 2,
    ),
    "norms, dense norm": ({"mask": Norms(), "norm": "dense"}, ["dense", "dense"]),
    "rows, a look at all": (
        {"mask": Scored("row", 0.5, score="weight"), "calibrate_every": 3},
        ["calibrating", "sparse", "sparse", "calibrating"],
    ),
    "interval": ({"schedule": Interval(2)}, ["dense", "base", "dense"]),
    "LookSAM": ({"schedule": Interval(2, reuse=0.5)}, ["dense", "reused", "dense"]),
    "window": ({"schedule": Window(1, 2)}, ["base", "dense", "base"]),
}


@pytest.mark.parametrize("case", KINDS)
def test_every_step_reports_its_kind(case: str) -> None:
    options, expected = KINDS[case]
    model = small_network("vit")
    opt = SparseSAM(model, sgd(model), **{"rho": RHO, **options})
    if opt.refresh_is_due:
        opt.refresh()
    kinds = []
    for batch in batches(len(expected), 4):
        resolved = opt.resolve()
        loss = opt.step(loss_fn, batch)
        assert opt.report is not None
        kinds.append(opt.report.kind)
        assert torch.equal(opt.report.loss, loss)
        assert opt.report.plan.counts == resolved.plan.counts
        ascends = opt.report.kind not in ("base", "reused")
        assert opt.report.radius == (RHO if ascends else 0.0)
        assert (opt.report.density > 0.0) == ascends
        assert not opt.report.skipped
    assert kinds == expected


def test_the_forms_by_hand_report_too() -> None:
    model = small_network("vit")
    opt = SparseSAM(model, sgd(model), rho=RHO, mask=Named("attn"))
    batch = batches(1, 4)[0]

    def closure() -> Tensor:
        opt.zero_grad()
        loss = loss_fn(model, batch)
        loss.backward()
        return loss

    loss = opt.step(closure)
    assert opt.report is not None
    assert (opt.report.kind, float(opt.report.loss)) == ("dense", float(loss))
    closure()
    with opt.perturbed():
        loss_fn(model, batch).backward()
    opt.step()
    assert (opt.report.kind, opt.report.loss, opt.report.radius) == ("dense", None, RHO)
    opt.step()
    assert opt.report.kind == "base"


def test_a_skipped_perturbation_is_reported_once() -> None:
    model = small_network("vit")
    opt = SparseSAM(model, sgd(model), rho=RHO)
    spoiled = [True]

    def loss(forward: Any, batch: Any) -> Tensor:
        value = loss_fn(forward, batch)
        return value * float("nan") if spoiled.pop(0) else value

    for fail in ([True, False], [False, False]):
        spoiled[:] = fail
        opt.step(loss, batches(1, 4)[0])
        assert opt.report is not None
        assert bool(opt.report.skipped) == fail[0]
    assert opt.skipped == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "l2"}, "norm is 'l2'; one of dense, masked, calibrated is needed"),
        ({"calibrate_every": 0}, "calibrate_every is 0; at least 1, or None, is needed"),
        ({"direction": Momentum(), "norm": "calibrated"}, "direction Momentum(…) never knows; use masked or dense"),
        ({"direction": Friendly(), "norm": "dense"}, "direction Friendly(…) never knows; use masked$"),
    ],
)
def test_options_out_of_their_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(…)", r"\(…\)")):
        StepOptions(**options)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [ConstantRadius(), Interval(5), Window(50, 150), Interval(3, reuse=0.5)], ids=repr)
@pytest.mark.parametrize("norm", ["dense", "masked", "calibrated"])
@pytest.mark.parametrize("mask", ["row 50%", "tensor"])
def test_shares_of_kinds_are_those_of_a_run(mask: str, norm: str, schedule: Any) -> None:
    """The cost model's mean step comes from the rules of the steps: a run of 200, its mask refreshed every 60."""
    model = tied_network()
    made = MASKS[mask]()
    opt = SparseSAM(model, sgd(model), rho=RHO, mask=made, norm=norm, calibrate_every=20, schedule=schedule)
    kinds: Counter[str] = Counter()
    for step in range(200):
        if step % 60 == 0:
            opt.refresh()
        opt.step(loss_fn, batches(1, 2)[0])
        assert opt.report is not None
        kinds[opt.report.kind] += 1
    shares = step_shares(schedule, opt.options, opt.plan, range(200), 60)
    assert shares.sparse == kinds["sparse"] / 200
    assert shares.dense == (kinds["dense"] + kinds["calibrating"]) / 200
    assert shares.reused == kinds["reused"] / 200

"""The options of the step: radii of groups and over time, norms, adaptive scales, loss scaling, and what is skipped."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ssam_scale import CosineRadius, Depth, Fresh, Interval, LRRadius, Scored, SparseSAM, Window
from ssam_scale.perturbation.perturb import Epsilon, squares
from ssam_scale.perturbation.reference import length_of, masked_by, reference_gradient
from tests.support.masks import whole_mask
from tests.support.networks import batches, freeze_batchnorm, loss_fn, small_network

BATCH = batches(1, 8)[0]


def vit(seed: int = 0) -> nn.Module:
    return freeze_batchnorm(small_network("vit", seed))


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.model.named_parameters()}


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def sgd(model: nn.Module, *rhos: float) -> torch.optim.SGD:
    """Over as many groups as there are radii, the parameters dealt out to them in turn."""
    every, n = list(model.parameters()), max(len(rhos), 1)
    groups = [{"params": every[i::n], **({"rho": rhos[i]} if rhos else {})} for i in range(n)]
    return torch.optim.SGD(groups, lr=0.05, momentum=0.9)


def perturbation(opt: SparseSAM, model: nn.Module, batch: Any = BATCH) -> dict[str, Tensor]:
    """ε of the next step, as (w + ε) − w."""
    before = weights(model)
    loss_fn(model, batch).backward()
    with opt.perturbed():
        inside = weights(model)
    opt.zero_grad()
    return {name: inside[name] - w for name, w in before.items()}


class Failing:
    """The mean loss, in one of its calls times infinity or not a number, as an overflow leaves it."""

    def __init__(self, call: int, factor: float = math.inf) -> None:
        self.left, self.factor = call, factor

    def __call__(self, forward: Any, batch: Any) -> Tensor:
        self.left -= 1
        return loss_fn(forward, batch) * (self.factor if self.left == 0 else 1.0)


def test_every_group_goes_its_own_rho_along_one_common_direction() -> None:
    model = vit()
    opt = SparseSAM(model, sgd(model, 0.2, 0.1, 0.0), rho=9.0)
    _, gradient = reference_gradient(model.model, loss_fn, BATCH)
    rho = {id(p): group["rho"] for group in opt.param_groups for p in group["params"]}
    radius = {name: rho[id(p)] for name, p in model.model.named_parameters()}
    length = length_of({name: g for name, g in gradient.items() if radius[name]})
    for name, epsilon in perturbation(opt, model).items():
        expected = (radius[name] / length).float() * gradient[name]
        torch.testing.assert_close(epsilon, expected, rtol=0, atol=2e-7)  # (w + ε) − w keeps 24 bits of w
        assert radius[name] or not epsilon.any()


def test_groups_without_a_rho_take_the_default_and_bad_ones_are_refused() -> None:
    model = vit()
    base = torch.optim.SGD([{"params": model.model.head.parameters(), "rho": 0.5}], lr=0.1)
    opt = SparseSAM(model, base, rho=0.1)
    opt.add_param_group({"params": model.model.blocks.parameters()})
    assert opt.radii == [0.5, 0.1]
    with pytest.raises(ValueError, match="the rho of a parameter group is -1"):
        opt.add_param_group({"params": model.model.norm.parameters(), "rho": -1.0})
    with pytest.raises(ValueError, match="rho is inf"):
        SparseSAM(model, base, rho=math.inf)


@pytest.mark.slow
def test_a_group_left_alone_costs_no_weight_gradient_in_the_ascent() -> None:
    def flops(*rhos: float) -> int:
        model = vit()
        opt = SparseSAM(model, sgd(model, *rhos))
        with FlopCounterMode(display=False) as counter:
            opt.step(loss_fn, BATCH)
        return counter.get_total_flops()

    assert flops(0.0, 0.0) == flops(0.1, 0.1) / 2
    # Dealt out in turn, the first group has nearly all weight matrices and the second the biases.
    assert flops(0.0, 0.0) < flops(0.0, 0.1) < flops(0.1, 0.1)


def test_a_group_turned_on_later_is_perturbed_from_then_on() -> None:
    model = vit()
    opt = SparseSAM(model, sgd(model, 0.0, 0.1))
    assert opt.density < 0.1
    opt.param_groups[0]["rho"] = 0.1
    assert opt.density == 1.0


@pytest.mark.parametrize(("final", "expected"), [(0.0, [0.2, 0.1, 0.0, 0.0]), (0.5, [0.2, 0.15, 0.1, 0.1])])
def test_a_cosine_radius_ends_at_its_final_share(final: float, expected: list[float]) -> None:
    model = vit()
    opt = SparseSAM(model, sgd(model), rho=0.2, schedule=CosineRadius(4, final))
    seen = []
    for step in (0, 2, 4, 9):
        opt.steps = step
        seen.append(opt.radii[0])
    assert seen == pytest.approx(expected)


def test_a_tied_radius_follows_the_learning_rate_of_each_group() -> None:
    model = vit()
    opt = SparseSAM(model, sgd(model, 0.2, 0.1), schedule=LRRadius())
    with pytest.raises(ValueError, match="build the scheduler before the first step"):
        opt.step(loss_fn, BATCH)
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, [lambda step: 0.5**step, lambda step: 1.0])
    assert opt.radii == [0.2, 0.1]
    opt.step(loss_fn, BATCH)
    scheduler.step()
    assert opt.radii == [0.1, 0.1]


def test_a_radius_that_has_come_to_zero_leaves_the_base_optimizer() -> None:
    ours, theirs = vit(), vit()
    opt = SparseSAM(ours, sgd(ours), rho=0.2, schedule=CosineRadius(1))
    base = SparseSAM(theirs, sgd(theirs), rho=0.0)
    opt.steps = 1
    assert opt.density == 0.0
    for o in (opt, base):
        o.step(loss_fn, BATCH)
    assert same(ours, theirs)


@pytest.mark.parametrize("mask", [Depth((0.5, 0.5)), Scored("element", 0.9)], ids=["depth", "element"])
@pytest.mark.parametrize("adaptive", [False, True])
def test_the_calibrated_norm_goes_as_far_as_the_dense_norm_would_have(mask: Any, adaptive: bool) -> None:
    model = vit()
    opt = SparseSAM(model, sgd(model), rho=0.3, mask=mask, norm="calibrated", calibrate_every=None, adaptive=adaptive)
    if isinstance(mask, Scored):
        opt.refresh(loss_fn, BATCH)
    chosen = whole_mask(opt)
    _, gradient = reference_gradient(model.model, loss_fn, BATCH, adaptive=adaptive)
    share = float(length_of(masked_by(gradient, chosen)) / length_of(gradient))
    assert 0.2 < share < 0.99

    def length(epsilon: dict[str, Tensor]) -> float:
        """In the coordinates that the radius is measured in."""
        if adaptive:
            epsilon = {n: e / (before[n].abs() + 0.01) for n, e in epsilon.items()}
        return float(length_of(epsilon))

    before = weights(model)
    assert length(perturbation(opt, model)) == pytest.approx(0.3 * share, rel=1e-4)  # has the dense gradient
    moved = {}

    def watch(forward: Any, batch: Any) -> Tensor:
        moved.update({name: now - before[name] for name, now in weights(model).items()})
        return loss_fn(forward, batch)

    opt.step(watch, BATCH)  # has only the masked part: the cut step knows the share from the last one
    assert length(moved) == pytest.approx(0.3 * share, rel=1e-4)


def test_a_refresh_and_every_nth_step_calibrate_again() -> None:
    model = vit()
    opt = SparseSAM(model, sgd(model), mask=Scored("tensor", 0.8), norm="calibrated", calibrate_every=3)
    opt.refresh(loss_fn, BATCH)

    def flops() -> int:
        with FlopCounterMode(display=False) as counter:
            opt.step(loss_fn, BATCH)
        return counter.get_total_flops()

    costs = [flops() for _ in range(9)]
    dense, sparse = costs[0], costs[3]
    assert dense > sparse
    # More often at first, when the share changes fastest: from step 4 on it is every third.
    assert costs == [dense, dense, dense, sparse, dense, sparse, sparse, dense, sparse]
    opt.refresh(loss_fn, BATCH)
    assert flops() == dense
    with pytest.raises(ValueError, match="calibrate_every is 0"):
        SparseSAM(model, sgd(model), norm="calibrated", calibrate_every=0)


def test_everything_needed_to_go_on_survives_a_state_dict() -> None:
    def make(model: nn.Module) -> SparseSAM:
        return SparseSAM(
            model,
            sgd(model, 0.2, 0.1),
            mask=Scored("element", 0.5),
            norm="calibrated",
            calibrate_every=4,
            schedule=CosineRadius(8),
        )

    model, other = vit(), vit(seed=1)
    opt, data = make(model), batches(6, 8)
    opt.refresh(loss_fn, data[0])
    opt.param_groups[1]["rho"] = 0.15
    for batch in data[:3]:
        opt.step(loss_fn, batch)
    opt.step(Failing(1), data[0])
    saved = copy.deepcopy(opt.state_dict())
    other.load_state_dict(model.state_dict())
    resumed = make(other)
    resumed.load_state_dict(saved)
    assert (resumed.steps, resumed.skipped, resumed.radii) == (4, 1, opt.radii)
    for batch in data[3:]:
        opt.step(loss_fn, batch)
        resumed.step(loss_fn, batch)
    assert same(model, other)

    base_only = make(vit())
    base_only.load_state_dict(base_only.base_optimizer.state_dict())
    assert base_only.radii == [0.2, 0.1]
    with pytest.raises(ValueError, match=r"a mask of pattern tensor and sparsity 0\.5 needs"):
        SparseSAM(other, sgd(other), mask=Scored("tensor", 0.5)).sparse.load_state_dict(saved["sparse_sam"])
    with pytest.raises(ValueError, match="this optimizer a Depth"):
        SparseSAM(other, sgd(other), mask=Depth()).sparse.load_state_dict(saved["sparse_sam"])


def test_adaptive_perturbs_in_proportion_to_the_weights() -> None:
    model = vit()
    opt = SparseSAM(model, sgd(model), rho=0.3, adaptive=True)
    _, gradient = reference_gradient(model.model, loss_fn, BATCH)
    scales = {name: w.abs() + 0.01 for name, w in weights(model).items()}
    length = length_of({name: scales[name] * g for name, g in gradient.items()})
    for name, epsilon in perturbation(opt, model).items():
        expected = 0.3 * (scales[name] ** 2 * gradient[name] / length).float()
        torch.testing.assert_close(epsilon, expected, rtol=0, atol=2e-7)


@pytest.mark.parametrize("norm", ["masked", "calibrated"])
@pytest.mark.parametrize("factor", [math.inf, math.nan])
def test_a_step_whose_ascent_gradient_is_not_finite_is_the_base_optimizers(norm: Any, factor: float) -> None:
    ours, theirs = vit(), vit()
    opt = SparseSAM(ours, sgd(ours), rho=0.3, norm=norm, mask=Depth((0.5, 0.5)))
    base = SparseSAM(theirs, sgd(theirs), rho=0.0)
    opt.step(Failing(1, factor), BATCH)
    base.step(loss_fn, BATCH)
    assert same(ours, theirs)
    assert (opt.skipped, opt.steps) == (1, 1)
    opt.step(loss_fn, BATCH)
    assert opt.skipped == 1
    assert all(p.isfinite().all() for p in ours.parameters())


def test_a_grad_scaler_skips_a_step_whose_descent_gradient_is_not_finite() -> None:
    for by_hand in (False, True):
        ours, theirs = vit(), vit()
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        opt = SparseSAM(ours, sgd(ours), rho=0.3, max_grad_norm=0.5, scaler=None if by_hand else scaler)
        plain = SparseSAM(theirs, sgd(theirs), rho=0.3, max_grad_norm=0.5)

        def step(loss: Any, opt: Any = opt, scaler: Any = scaler, model: Any = ours, by_hand: bool = by_hand) -> None:
            if not by_hand:
                opt.step(loss, BATCH)
                return
            scaler.scale(loss(model, BATCH)).backward()
            with opt.perturbed():
                scaler.scale(loss(model, BATCH)).backward()
            scaler.unscale_(opt)
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()

        before = weights(ours)
        step(Failing(2))
        assert all(torch.equal(w, before[name]) for name, w in weights(ours).items())
        assert scaler.get_scale() == 512.0
        assert (opt.skipped, opt.steps) == (0, 1)
        step(loss_fn)
        plain.step(loss_fn, BATCH)
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-6)  # powers of 2 scale exactly; 1e-7 / ‖g‖ does not


def test_float16_with_loss_scaling_stays_near_float32() -> None:
    ours, theirs = vit(), vit()
    opt = SparseSAM(ours, sgd(ours), rho=0.1, mask=Depth((0.5, 0.5)), scaler=torch.amp.GradScaler("cpu", 1024.0))
    exact = SparseSAM(theirs, sgd(theirs), rho=0.1, mask=Depth((0.5, 0.5)))

    def in_fp16(forward: Any, batch: Any) -> Tensor:
        with torch.autocast("cpu", torch.float16):
            logits = forward(batch[0])
        return F.cross_entropy(logits.float(), batch[1])

    start = weights(ours)
    for batch in batches(3, 8):
        opt.step(in_fp16, batch)
        exact.step(loss_fn, batch)
    mine, other = weights(ours), weights(theirs)
    apart = length_of({n: mine[n] - other[n] for n in start})
    # float16 keeps 11 bits: gradients agree to about 2^-9, and so do the ways that the weights went.
    assert apart < 2.0**-8 * length_of({n: other[n] - start[n] for n in start})


def test_a_scaled_refresh_chooses_the_same_weights() -> None:
    model = vit()
    plans = []
    for scaler in (None, torch.amp.GradScaler("cpu")):
        opt = SparseSAM(model, sgd(model), mask=Scored("element", 0.5), scaler=scaler)
        opt.refresh(loss_fn, BATCH)
        plans.append(whole_mask(opt))
    assert all(torch.equal(mask, plans[1][name]) for name, mask in plans[0].items())


def test_steps_count_ascents_and_nothing_else() -> None:
    model = vit()
    opt = SparseSAM(model, sgd(model))
    loss_fn(model, BATCH).backward()
    with opt.perturbed():
        loss_fn(model, BATCH).backward()
    assert opt.steps == 1
    opt.step()
    assert opt.steps == 1
    opt.zero_grad()
    loss_fn(model, BATCH).backward()
    with pytest.raises(ArithmeticError), opt.perturbed():
        raise ArithmeticError
    assert opt.steps == 1
    opt.step(loss_fn, BATCH)
    assert opt.steps == 2


class Branches(nn.Module):
    """A network with a weight used twice, and a branch that is used only on request."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(10, 6)
        self.branch = nn.Linear(6, 6)
        self.head = nn.Linear(6, 10, bias=False)
        self.head.weight = self.embed.weight
        self.branches = True

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        if self.branches:
            hidden = hidden + self.branch(hidden).tanh()
        return self.head(hidden)


@pytest.mark.parametrize("used", [(True, False), (False, True)])
def test_tied_weights_and_parameters_without_a_gradient_in_one_pass(used: tuple[bool, bool]) -> None:
    model = Branches()
    opt = SparseSAM(model, torch.optim.SGD(model.parameters(), lr=0.1), rho=0.2)
    assert list(opt.parameters.by_name) == ["embed.weight", "branch.weight", "branch.bias"]
    passes = iter(used)

    def loss(forward: Any, batch: Tensor) -> Tensor:
        model.branches = next(passes)
        return F.cross_entropy(forward(batch), (batch + 1) % 10)

    tokens = torch.arange(10)
    expected = copy.deepcopy(model)
    before = {name: p.detach().clone() for name, p in expected.named_parameters()}
    for branches in used:
        expected.branches = branches
        gradient = reference_gradient(expected, lambda m, b: F.cross_entropy(m(b), (b + 1) % 10), tokens)[1]
        start = {name: before[name] for name in gradient}
        with torch.no_grad():
            for name, p in expected.named_parameters():
                p.copy_(start[name] + 0.2 / float(length_of(gradient)) * gradient[name])
    opt.step(loss, tokens)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] - 0.1 * gradient[name], rtol=0, atol=1e-6)


def test_weights_of_two_bytes_are_moved_in_float32_and_come_back_bit_for_bit() -> None:
    model = vit().bfloat16()
    opt = SparseSAM(model, sgd(model), rho=1.0, mask=Scored("element", 0.5))
    batch = (BATCH[0].bfloat16(), BATCH[1])
    opt.refresh(loss_fn, batch)
    before = weights(model)
    gradient = reference_gradient(model.model, loss_fn, batch)[1]
    masked = masked_by(gradient, whole_mask(opt))
    loss_fn(model, batch).backward()
    with opt.perturbed():
        inside = weights(model)
    length = float(length_of(masked))
    for name, w in before.items():
        # Rounded once, after an addition in float32: nothing else is allowed to lose bits.
        expected = (w.float() + masked[name] * torch.tensor(1.0 / (length + 1e-7))).bfloat16()
        # The length is summed in another order, which may turn a tie of the rounding: one unit in the last place.
        apart = (inside[name].view(torch.int16).int() - expected.view(torch.int16).int()).abs()
        assert apart.max() <= 1
        assert (apart != 0).float().mean() < 1e-3
    assert all(torch.equal(w, before[name]) for name, w in weights(model).items())


@settings(max_examples=50, deadline=None)
@given(
    lists=st.lists(st.lists(st.floats(-1e3, 1e3, width=32), min_size=0, max_size=8), min_size=1, max_size=4),
    norm=st.sampled_from([0.5, 3.0, math.inf, -math.inf, math.nan]),
    bad=st.booleans(),
)
def test_without_a_finite_norm_nothing_is_left_of_a_gradient(lists: list[list[float]], norm: float, bad: bool) -> None:
    gradients = [torch.tensor(values, dtype=torch.float32) for values in lists]
    alpha, finite = torch.tensor(1.0) / (torch.tensor(norm) + 1e-7), torch.tensor(norm).isfinite()
    expected = [g * (0.1 / (norm + 1e-7)) if math.isfinite(norm) else torch.zeros_like(g) for g in gradients]
    if bad and not math.isfinite(norm):
        for g in gradients:
            g[:1] = math.nan
    epsilon = Epsilon(gradients, [None] * len(gradients), [0.1] * len(gradients), alpha, finite)
    weights = [torch.ones_like(g) for g in gradients]
    epsilon.add_(weights, None)
    for mine, w, other in zip(epsilon.computed(), weights, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=0)
        # Rounded as the sum is, whose terms may cancel.
        assert bool(((w - (1.0 + mine)).abs() <= 2e-7 * (1.0 + mine.abs())).all())


def test_squares_of_nothing_are_nothing() -> None:
    device = torch.device("cpu")
    assert squares([], device).shape == (0,)
    assert squares([torch.zeros(0), torch.tensor([3.0, 4.0])], device).tolist() == pytest.approx([0.0, 25.0])


def test_a_fraction_of_the_batch_costs_a_fraction_of_the_ascent() -> None:
    model = vit()

    def flops(**options: Any) -> int:
        opt = SparseSAM(model, sgd(model), **options)
        if opt.refresh_is_due:
            opt.refresh(loss_fn, BATCH)
        with FlopCounterMode(display=False) as counter:
            opt.step(loss_fn, BATCH)
        return counter.get_total_flops()

    base, whole = flops(rho=0.0), flops()
    assert whole == 2 * base
    assert flops(direction=Fresh(0.5)) == base + base // 2
    cut = Depth((0.5, 0.5))
    suffix = flops(mask=cut) - base
    assert flops(mask=cut, direction=Fresh(0.25)) == base + suffix // 4
    seen = []

    def watch(forward: Any, batch: Any) -> Tensor:
        seen.append(len(batch[1]))
        return loss_fn(forward, batch)

    SparseSAM(model, sgd(model), direction=Fresh(0.3)).step(watch, BATCH)
    SparseSAM(model, sgd(model), direction=Fresh(0.01)).step(watch, BATCH)
    assert seen == [2, 8, 1, 8]
    with pytest.raises(ValueError, match=r"fraction is 0\.0; a share in \(0, 1\] is needed"):
        Fresh(0.0)


def test_a_shared_prefix_updates_its_statistics_once_with_the_whole_batch() -> None:
    model, expected = small_network("resnet"), small_network("resnet")
    batch = batches(1, 8)[0]
    SparseSAM(model, sgd(model), mask=Depth((0.5, 0.5)), direction=Fresh(0.25)).step(loss_fn, batch)
    expected(batch[0])
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(getattr(model.model.bn1, name), getattr(expected.model.bn1, name))
    assert model.model.layer4[1].bn2.num_batches_tracked == 1


def test_intervals_and_windows_leave_the_other_steps_to_the_base_optimizer() -> None:
    model = vit()
    opt = SparseSAM(model, sgd(model), rho=0.3, schedule=Interval(3, Window(3, 7, CosineRadius(9))))
    radii = []
    for _ in range(9):
        [radius] = opt.radii
        radii.append(radius)
        assert opt.density == float(radius > 0)
        with FlopCounterMode(display=False) as counter:
            opt.step(loss_fn, BATCH)
        radii.append(counter.get_total_flops())
    once = min(radii[1::2])
    assert radii[1::2] == [once * (2 if step in (3, 6) else 1) for step in range(9)]
    expected = [0.3 * CosineRadius(9)(step, {}) if step in (3, 6) else 0.0 for step in range(9)]
    assert radii[::2] == pytest.approx(expected)
    for wrong in (lambda: Interval(0), lambda: Window(3, 3), lambda: Window(-1)):
        with pytest.raises(ValueError, match="needed"):
            wrong()
